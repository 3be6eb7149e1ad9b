"""Keep pruned weights at exactly zero while the kept weights train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_prune.callbacks.order import run_last
from lit_prune.callbacks.prune import Prune
from lit_prune.callbacks.states import restoring
from lit_prune.checkpoint.infer_masks import masks_of_zeros
from lit_prune.checkpoint.masks import MASKS_FILE, load_masks
from lit_prune.errors import InputError, NumericalError
from lit_prune.internals.lightning import average_model
from lit_prune.models.lora import mask_adapters, unmasked_adapter
from lit_prune.ops import PackedMask
from lit_prune.ops.masks import keep_only, restored_masks
from lit_prune.pruning import PruningReport
from lit_prune.sharding.parameters import (
    count_revived,
    full_shape,
    is_finite,
    mask_gradient,
    sets_sharded_gradients,
    zero_pruned,
)

ZEROS = "zeros"
"""Value of ``masks`` that treats every weight that is exactly zero as pruned."""
_HOLDS = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)

_DIVERGED = "holds NaN or Inf"


class KeepMasks(Callback):
    """Keeps pruned weights at zero during training, by masking gradients, and audits them.

    After a pruning, newly pruned entries are zeroed in weights, float32 masters and optimizer moments. A weight that is
    zero, with zero gradient and moments, stays zero under any element-wise optimizer, including weight decay; an
    optimizer that mixes elements fails the audit. The audit runs at each validation and at the end, on all tensors that
    each process holds, except optimizer state that only scales steps; it names the first parameter with a nonzero
    pruned weight, and stops the run. Works on one device and with DDP, FSDP2 and DeepSpeed ZeRO-1, -2 and -3.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: Prune, init_args: {plan: ...}}, {class_path: KeepMasks}]}

    To fine-tune a model that is already pruned:

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: KeepMasks, init_args: {masks: out/pruned}}]}
    """

    def __init__(self, masks: str | None = None) -> None:
        """Store the arguments.

        Args:
            masks: Source of the keep masks: null = the ``Prune`` callback; a pruned folder or its
                ``masks.safetensors``; or ``zeros`` = every weight that is exactly zero when training starts is pruned.
        """
        self.source = masks
        self.masks: dict[str, PackedMask] = {}
        """Current keep masks by parameter name, one bit per weight."""
        self._hooks: dict[str, RemovableHandle] = {}
        self._restored: dict[str, PackedMask] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ``InputError`` if the strategy does not support masks, or if there is no source of masks."""
        if stage != "fit":
            return
        check_strategy(trainer.strategy)
        run_last(trainer, self)
        if any(isinstance(callback, StochasticWeightAveraging) for callback in _callbacks(trainer)):
            raise InputError(
                "StochasticWeightAveraging copies the model before it is loaded, so it would average nothing: use "
                "WeightAveraging or EMAWeightAveraging"
            )
        if self.source is None and not any(isinstance(callback, Prune) for callback in _callbacks(trainer)):
            raise InputError(
                "KeepMasks has no masks to keep: add a Prune callback, or set its masks to a pruned folder or 'zeros'"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the masks that are known before the first step."""
        if self._restored:
            masks = self._restored
            self._refuse_change(masks)
        elif self.source == ZEROS:
            masks = masks_of_zeros(pl_module.get_submodule("model"))
        elif self.source is not None:
            masks = load_masks(self.source)
            self._refuse_others(trainer, pl_module, masks)
        else:
            report = next(callback for callback in _callbacks(trainer) if isinstance(callback, Prune)).report
            masks = report.masks if report else {}
        self.take(trainer, pl_module, masks)

    def on_pruned(self, trainer: Trainer, pl_module: LightningModule, report: PruningReport) -> None:
        """Apply the masks of a pruning that has just finished."""
        self.take(trainer, pl_module, report.masks)

    def take(self, trainer: Trainer, pl_module: LightningModule, masks: Mapping[str, PackedMask]) -> None:
        """Replace the masks: zero pruned entries of weights, masters and moments, and mask gradients from now on."""
        model = pl_module.get_submodule("model")
        parameters = _parameters_of(model, masks)
        self._remove_hooks()
        self.masks = {name: mask.to(pl_module.device) for name, mask in masks.items()}
        mask_adapters(model, self.masks)
        averages = [dict(model.named_parameters()) for model in averaged_models(trainer)]
        for name, mask in self.masks.items():
            parameter = parameters[name]
            zero_pruned(parameter, mask.unpack(), _optimizer(trainer))
            for average in averages:
                zero_pruned(average[name], mask.unpack())
            if parameter.requires_grad and not sets_sharded_gradients(parameter):
                self._hooks[name] = parameter.register_hook(self._masked(mask))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients of parameters without a gradient hook."""
        for name, parameter, mask in self._kept(pl_module):
            if name not in self._hooks:
                mask_gradient(parameter, mask.unpack())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore the masks of averaged adapters, because weight averaging also averages buffers."""
        for model in averaged_models(trainer):
            mask_adapters(model, self.masks)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the masks of averaged adapters, because averages can also be updated in this hook."""
        for model in averaged_models(trainer):
            mask_adapters(model, self.masks)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the pruned weights."""
        self.audit(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the pruned weights."""
        self.audit(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit again, because other callbacks may have changed weights at the end; remove the gradient hooks."""
        self.audit(trainer, pl_module)
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the gradient hooks."""
        self._remove_hooks()

    def audit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a ``RuntimeError`` that names the first parameter with a pruned weight that is not exactly zero.

        Checks weights, float32 masters and optimizer moments, each process its own shard; all processes must call this
        method, and all of them raise. Adapters must have the same masks, so that they cannot change a pruned weight.
        """
        adapter = unmasked_adapter(pl_module.get_submodule("model"), self.masks)
        found = [f"{adapter}: its adapter has another mask"] if adapter else []
        for name, parameter, mask in self._kept(pl_module):
            revived = count_revived(parameter, mask.unpack(), _optimizer(trainer))
            if any(revived.values()) and not is_finite(parameter):
                found.append(f"{name} {_DIVERGED}")
            found += [f"{name}: {n} pruned weights are not zero in its {place}" for place, n in revived.items() if n]
        for model in averaged_models(trainer):
            found += [
                f"{name}: {count} pruned weights are not zero in its average"
                for name, mask in self.masks.items()
                if (count := count_revived(model.get_parameter(name), mask.unpack())["weight"])
            ]
        first = _first_of_all_processes(found)
        if first is not None and first.endswith(_DIVERGED):
            raise NumericalError(f"{first}: the training diverged; lower the learning rate, or check the optimizer")
        if first is not None:
            raise RuntimeError(f"{first}: the masks no longer hold")

    def state_dict(self) -> dict[str, Any]:
        """Return the packed masks, unless they come from the ``Prune`` callback, which saves them itself."""
        masks = self.masks if self.source is not None else {}
        return {
            "masks": {name: mask.bits.cpu() for name, mask in masks.items()},
            "mask_shapes": {name: list(mask.shape) for name, mask in masks.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by ``state_dict``."""
        with restoring(self):
            self._restored = restored_masks(state_dict["masks"], state_dict["mask_shapes"])

    def _refuse_others(self, trainer: Trainer, pl_module: LightningModule, masks: Mapping[str, PackedMask]) -> None:
        """Raise ``InputError`` if the masks belong to another model, for example if the model is dense."""
        found = [
            f"{count} values that they prune are not zero in {name}"
            for name, parameter in _parameters_of(pl_module.get_submodule("model"), masks).items()
            if (count := sum(count_revived(parameter, masks[name].unpack().to(pl_module.device)).values()))
        ]
        first = _first_of_all_processes(found)
        if first is not None:
            raise InputError(
                f"KeepMasks.masks is {self.source!r}, masks of another model: {first}; set --model.pretrained to the "
                "pruned folder that they belong to"
            )

    def _refuse_change(self, restored: Mapping[str, PackedMask]) -> None:
        """Raise ``InputError`` if the masks in the checkpoint differ from the masks given now."""
        if self.source in (None, ZEROS):
            return
        path = Path(str(self.source)).expanduser()
        if not (path / MASKS_FILE if path.is_dir() else path).is_file():  # the checkpoint has all masks
            return
        given = load_masks(str(self.source))
        for name in sorted(given.keys() | restored.keys()):
            mine, other = restored.get(name), given.get(name)
            if mine is None or other is None or not torch.equal(mine.bits.cpu(), other.bits):
                raise InputError(
                    f"cannot resume from this checkpoint: it was written with another mask of {name} than that of "
                    f"KeepMasks.masks, {self.source!r}; give the same masks, or start again without --ckpt_path"
                )

    def _kept(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Parameter, PackedMask]]:
        model = pl_module.get_submodule("model")
        for name, mask in self.masks.items():
            yield name, model.get_parameter(name), mask

    @staticmethod
    def _masked(mask: PackedMask) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            return keep_only(gradient, mask.unpack())

        return hook

    def _remove_hooks(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()


def check_strategy(strategy: Strategy) -> None:
    """Raise ``InputError`` if a strategy does not support keep masks."""
    if not isinstance(strategy, _HOLDS):
        raise InputError(
            f"trainer.strategy is {type(strategy).__name__}: it cannot hold masks; use ddp, "
            "lit_prune.training.strategies.FSDP2 or lit_prune.training.strategies.DeepSpeed"
        )


def find_keep_masks(trainer: Trainer) -> KeepMasks | None:
    """Return the trainer's ``KeepMasks`` callback; None if it has none."""
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, KeepMasks)), None)


def averaged_models(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the averaged language models of weight-averaging callbacks, which replace the model's at the end."""
    for callback in _callbacks(trainer):
        if isinstance(callback, WeightAveraging) and (average := average_model(callback)) is not None:
            yield average.module.get_submodule("model")


def _parameters_of(model: nn.Module, masks: Mapping[str, PackedMask]) -> dict[str, nn.Parameter]:
    """Return the parameters with masks, by name; raise ``InputError`` if one is missing or has another shape."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or full_shape(parameters[name]) != tuple(mask.shape):
            raise InputError(f"masks are for another model: it has no {name} of shape {tuple(mask.shape)}")
    return {name: parameters[name] for name in masks}


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _optimizer(trainer: Trainer) -> Optimizer | None:
    return trainer.optimizers[0] if trainer.optimizers else None


def _first_of_all_processes(found: list[str]) -> str | None:
    everywhere: list[Any] = [found]
    if distributed.is_available() and distributed.is_initialized():
        everywhere = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, found[:1])
    return next((line for lines in everywhere for line in lines), None)
