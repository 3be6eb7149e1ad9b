"""Keep pruned weights at exactly zero while the others train."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_prune.callbacks.prune import find_prune
from lit_prune.errors import InputError
from lit_prune.models.io import check_masks_hold
from lit_prune.pruning import PruningReport


class KeepMasks(Callback):
    """Masks gradients before every optimizer step and optimizer moments after every pruning; audits the result.

    A weight whose gradient and moments are zero stays where it is under any optimizer that works element by element,
    weight decay included. The audit runs at each validation and at the end; it names the first parameter in which a
    pruned weight came back, and stops.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: Prune, init_args: {plan: ...}}, {class_path: KeepMasks}]}
    """

    def __init__(self) -> None:
        """Start without masks: they are the ``Prune`` callback's."""
        self._source: PruningReport | None = None
        self._pruned: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be kept yet."""
        if stage == "fit" and trainer.world_size > 1:
            raise InputError(f"{trainer.world_size} processes: masks are kept in one, so set --trainer.devices 1")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights, and their moments where the masks are new."""
        changed = self._refresh(trainer, pl_module)
        for name, pruned in self._pruned.items():
            parameter = pl_module.get_submodule("model").get_parameter(name)
            tensors = [parameter.grad]
            if changed:
                tensors += [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
            for tensor in tensors:
                if tensor is not None and tensor.shape == pruned.shape:
                    tensor.masked_fill_(pruned, 0.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit."""
        self.audit(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit."""
        self.audit(trainer, pl_module)

    def audit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``RuntimeError`` that names the first parameter with a pruned weight that is not exactly zero."""
        report = find_prune(trainer).report
        if report is not None:
            check_masks_hold(pl_module.get_submodule("model"), report.masks)

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        report = find_prune(trainer).report
        if report is None or report is self._source:
            return False
        self._source = report
        self._pruned = {name: ~mask.unpack().to(pl_module.device) for name, mask in report.masks.items()}
        return True
