"""Save the trained, pruned model as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.callbacks.keep_masks import ZEROS, find_keep_masks
from lit_prune.callbacks.order import run_last
from lit_prune.callbacks.prune import Prune, find_prune
from lit_prune.callbacks.states import restoring
from lit_prune.callbacks.stop_on_divergence import DivergedError
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.outputs import check_output
from lit_prune.checkpoint.peft_format import without_adapters
from lit_prune.checkpoint.save import save_pruned
from lit_prune.checkpoint.training_checkpoints import plain_data_only
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask
from lit_prune.pruning import PruningReport
from lit_prune.reporting.documents import read_report, render
from lit_prune.sharding.parameters import full_model


class Export(Callback):
    """Writes a folder for ``AutoModelForCausalLM.from_pretrained`` when training ends.

    The keep masks are taken from ``Prune``, or from ``KeepMasks`` if the model was pruned before; if ``KeepMasks`` read
    them from a pruned folder, that folder's report is updated and written again. The masks are verified first: if a
    pruned weight is not zero, an error is raised and nothing is written. Masked adapters are merged into the weights;
    plain adapters (``LoRA`` with ``masked: false``) are written to the subfolder ``adapter``.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: Export, init_args: {output: sparse-model}}]}

    To export the best model instead of the last, even if training diverges later:

    .. code-block:: yaml

        trainer:
          callbacks:
            - {class_path: ModelCheckpoint, init_args: {monitor: val/perplexity}}
            - {class_path: Export, init_args: {output: sparse-model, best: true}}
    """

    def __init__(self, output: str, overwrite: bool = False, best: bool = False) -> None:
        """Store the arguments.

        Args:
            output: Folder to write.
            overwrite: Replace the folder if it exists.
            best: Export the best checkpoint that ``ModelCheckpoint`` wrote since the last pruning instead of the last
                weights; if there is none, export the last weights with a warning.
        """
        self.output = output
        self.overwrite = overwrite
        self.best = best
        self.validation: dict[str, list[tuple[int, float]]] = {}
        """Validation history for the report: (optimizer step, perplexity) pairs for each validation text."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ``InputError`` before training if the model cannot be exported."""
        if stage != "fit":
            return
        run_last(trainer, self)  # an average of weights, written to the model at the end, would replace the best one
        keep_masks = find_keep_masks(trainer)
        reads = [getattr(pl_module, "pretrained", None), keep_masks.source if keep_masks else None]
        check_output(self.output, self.overwrite, reads=[str(name) for name in reads if name])
        if keep_masks is None or _prunes(trainer):
            find_prune(trainer)
        elif keep_masks.source not in (None, ZEROS):
            read_report(keep_masks.source, load_masks(keep_masks.source))
        if self.best and _monitoring(trainer).save_weights_only and isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(
                f"Export.best is on, and ModelCheckpoint.save_weights_only: {type(trainer.strategy).__name__} cannot "
                "load the best checkpoint without its optimizer; make save_weights_only false"
            )

    def on_pruned(self, trainer: Trainer, pl_module: LightningModule, report: PruningReport) -> None:
        """Discard the checkpoints of the previous, less sparse model as candidates for the export."""
        if self.best:
            checkpoint = _monitoring(trainer)
            checkpoint.best_k_models = {}
            checkpoint.best_model_score = None
            checkpoint.best_model_path = checkpoint.kth_best_model_path = ""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the perplexities for the report."""
        if trainer.sanity_checking:
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/perplexity"):
                text = name.removeprefix("val/perplexity").removeprefix("/") or "validation text"
                self.validation.setdefault(text, []).append((trainer.global_step, value.item()))

    def state_dict(self) -> dict[str, Any]:
        """Return the validation history so far."""
        return {"validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by ``state_dict``."""
        with restoring(self):
            self.validation = state_dict["validation"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best checkpoint if ``best`` is set, while the strategy can still load it."""
        if self.best:
            self._load_best(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the model."""
        self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the best model if training diverged."""
        if self.best and isinstance(exception, DivergedError) and _monitoring(trainer).best_model_path:
            self._load_best(trainer)
            self._save(trainer, pl_module)

    def _load_best(self, trainer: Trainer) -> None:
        path = _monitoring(trainer).best_model_path
        if not path:
            rank_zero_warn(
                "Export.best is on, and no checkpoint was written since the last pruning: the last weights are "
                "exported; lower --trainer.val_check_interval to have a choice"
            )
            return
        strategy = trainer.strategy
        with plain_data_only(path):  # the path may come from a resumed, untrusted checkpoint
            strategy.load_model_state_dict(strategy.load_checkpoint(path, weights_only=True))

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        masks, report = _masks_and_report(trainer)
        if report is not None:
            report.validation = self.validation
            report.recipes += [recipe] if (recipe := getattr(trainer, "recipe", None)) else []
        model = pl_module.get_submodule("model")
        with full_model(model) as whole, without_adapters(whole) as adapters:
            if str(trainer.precision).endswith("-true"):
                for name, parameter in whole.named_parameters():  # the training dtype, not that of the float32 masters
                    parameter.data = parameter.data.to(model.get_parameter(name).dtype)
            smaller = report is not None and bool(report.kept)
            if trainer.is_global_zero:
                title = Path(str(pl_module.pretrained)).name
                documents = render(report, title, adapters=bool(adapters)) if report else {}
                folder = save_pruned(
                    self.output,
                    report.smaller(whole) if report and smaller else whole,
                    pl_module.load_tokenizer(),  # type: ignore[operator]
                    {} if smaller else masks,
                    adapters | documents,
                    self.overwrite,
                )
                if not getattr(trainer, "quiet", False):
                    print(f"wrote {folder}")
        trainer.strategy.barrier("export")


def _prunes(trainer: Trainer) -> bool:
    return any(isinstance(callback, Prune) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _masks_and_report(trainer: Trainer) -> tuple[Mapping[str, PackedMask], PruningReport | None]:
    keep_masks = find_keep_masks(trainer)
    if keep_masks is None or _prunes(trainer):
        report = find_prune(trainer).report
        if report is None:
            raise InputError("nothing was pruned in this run, so there is no report to export")
        return report.masks, report
    report = read_report(keep_masks.source or "", keep_masks.masks)
    if report is not None:
        report.evaluation, report.samples = {}, []  # these describe the weights before this training
        report.identity["plan"]["quantize"] = None  # which it moved off their grids
    return keep_masks.masks, report


def _monitoring(trainer: Trainer) -> ModelCheckpoint:
    """Return the only ``ModelCheckpoint`` with a monitor; raise ``InputError`` if there is not exactly one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if len(found) != 1:
        raise InputError(
            f"Export.best is on, and trainer.callbacks has {len(found)} ModelCheckpoints with a monitor: exactly one "
            "is needed, such as {class_path: ModelCheckpoint, init_args: {monitor: val/perplexity}}"
        )
    return found[0]
