"""Prune the model at scheduled optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_prune.callbacks.log_pruning import log_outcome, log_pruning
from lit_prune.callbacks.states import restoring
from lit_prune.errors import InputError
from lit_prune.models.lora import adapted_layers
from lit_prune.ops import PackedMask, Structured
from lit_prune.ops.masks import restored_masks
from lit_prune.pruning import OneShot, PruningPlan, PruningReport, Schedule, prune
from lit_prune.pruning.journal import differences
from lit_prune.pruning.preflight import preflight
from lit_prune.pruning.progress import progress


@dataclass(frozen=True)
class Request:
    """Arguments of one pruning; see ``lit_prune.prune``."""

    plan: PruningPlan
    journal_folder: Path | None = None
    resume: bool = False
    sparsity: float | None = None
    allocation: Mapping[str, float] | None = None
    allowed: Mapping[str, PackedMask] | None = None


@runtime_checkable
class PruningListener(Protocol):
    """A callback that is notified when a model in training has been pruned."""

    def on_pruned(self, trainer: Trainer, pl_module: LightningModule, report: PruningReport) -> None:
        """React to a pruning; weights and masks are already equal in every process."""


class Prune(Callback):
    """Prunes a model at the steps of a schedule during training, or once for ``lit-prune prune``.

    The calibration set comes from the data module. ``KeepMasks`` keeps pruned weights at zero between and after
    prunings.

    On the command line, this callback is created from the options ``plan`` and ``schedule``. In full:

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: Prune
              init_args:
                plan:
                  pattern: {class_path: Unstructured, init_args: {sparsity: 0.5}}
                  scorer: {class_path: Wanda}
                schedule: {class_path: OneShot}
            - class_path: KeepMasks
    """

    def __init__(
        self,
        plan: PruningPlan,
        schedule: Schedule | None = None,
        allocation: Literal["frozen", "recomputed"] = "frozen",
        regrowth: bool = True,
    ) -> None:
        """Validate and store the arguments.

        Args:
            plan: Pruning plan: pattern, scorer, allocator and solver.
            schedule: Optimizer steps at which to prune; null = ``OneShot``, once at the start.
            allocation: Allocation if the schedule prunes more than once: scale the dense model's allocation in
                proportion (``frozen``), or allocate again from the current weights (``recomputed``).
            regrowth: Allow a pruning to keep weights that an earlier one removed; false requires a ``frozen``
                allocation.
        """
        if allocation not in ("frozen", "recomputed"):
            raise InputError(f"allocation is {allocation!r}: it must be 'frozen' or 'recomputed'")
        if not regrowth and allocation != "frozen":
            raise InputError(
                "regrowth is off and allocation is 'recomputed': a layer could get less sparsity than it has; make it "
                "'frozen'"
            )
        self.plan = plan
        self.allocation = allocation
        self.regrowth = regrowth
        self.schedule = schedule or OneShot()
        self.report: PruningReport | None = None
        """Report of the latest pruning, including its masks; None before the first."""
        self.pruned_at: int | None = None
        """Optimizer step of the latest pruning; None before the first."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``InputError`` if the schedule outlasts the training; prune if a pruning is due at step 0."""
        if self.plan.quantize:
            raise InputError(
                "plan.quantize rounds weights to a grid, and training moves them off it: leave it out, and quantise "
                "the trained model with lit-prune prune"
            )
        if self.plan.removes_blocks:
            raise InputError(
                "plan.pattern.units has blocks: remove blocks with lit-prune prune first, and train the smaller model"
            )
        if isinstance(self.plan.pattern, Structured) and not getattr(
            getattr(pl_module, "trainable", None), "masked", True
        ):
            raise InputError(
                "LoRA.masked is false, and the pattern is structured: plain adapters would have the sizes of the "
                "larger model; make it true, or prune first and train the smaller model"
            )
        steps = trainer.estimated_stepping_batches
        if self.schedule.last > steps:
            raise InputError(
                f"the schedule prunes until step {self.schedule.last}, and training ends after {steps:.0f} optimizer "
                "steps: raise --trainer.max_steps or --trainer.max_epochs, or end the schedule earlier"
            )
        if self.report is None and trainer.global_step > self.schedule.last:
            raise InputError(
                f"the checkpoint is of step {trainer.global_step}, after the last pruning of the schedule (step "
                f"{self.schedule.last}), and holds no masks: give a checkpoint of a run with Prune, or start again "
                "without --ckpt_path"
            )
        if self.schedule.last > 0 and adapted_layers(pl_module.get_submodule("model")):
            raise InputError(
                f"the schedule prunes until step {self.schedule.last}, and adapters are trained: a pruning would "
                "ignore their updates; prune at step 0 (OneShot), or train Everything"
            )
        self._prune_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune if a pruning is due after this optimizer step."""
        self._prune_if_due(trainer, pl_module)

    def _prune_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if self.schedule.due(step) and self.pruned_at != step:
            request = self._due_at(step)
            batches = _calibration(trainer) if request.plan.needs_data else []
            self.prune(trainer, pl_module, batches, request)
            self.pruned_at = step

    def _due_at(self, step: int) -> Request:
        sparsity = self.schedule.sparsity(step, self.plan.pattern.sparsity)
        if self.allocation == "recomputed":
            return Request(self.plan.at(sparsity))
        before = self.report
        return Request(
            self.plan,
            sparsity=sparsity if sparsity != self.plan.pattern.sparsity else None,
            allocation=before.allocation if before else None,
            allowed=before.masks if before and not self.regrowth else None,
        )

    def prune(
        self, trainer: Trainer, pl_module: LightningModule, batches: Sequence[Tensor], request: Request
    ) -> PruningReport:
        """Prune immediately, independently of the schedule, and return the report."""
        model, before = pl_module.get_submodule("model"), self.report
        shown = trainer.is_global_zero and not getattr(trainer, "quiet", False)
        context = trainer.precision_plugin.forward_context
        resumed = request.resume and request.journal_folder is not None and request.journal_folder.is_dir()
        expected = preflight(model, batches, request.plan, context) if before is None and not resumed else None
        if expected and shown:
            print(f"pruning takes {expected}", flush=True)
        with progress(shown) as show:
            self.report = prune(model, batches, on_progress=show, forward_context=context, **vars(request))
        if before and not self.report.metrics:
            self.report.metrics = before.metrics  # metrics of the allocation that this pruning reused
        if self.report.calibration:
            self.report.calibration.text = getattr(getattr(trainer, "datamodule", None), "calibration_text", None)
        if trainer.state.fn == TrainerFn.FITTING:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, PruningListener):
                    callback.on_pruned(trainer, pl_module, self.report)
                elif isinstance(callback, EarlyStopping):  # its best score is from the previous, less sparse model
                    callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
                    callback.wait_count = 0
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                log_pruning(logger, self.report, before, trainer.global_step)
        return self.report

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if training stopped before the end of the schedule."""
        if self.pruned_at is None or self.pruned_at < self.schedule.last:
            rank_zero_warn(
                f"training stopped at step {trainer.global_step}, before the schedule prunes for the last time (step "
                f"{self.schedule.last}): the model has {self.report.sparsity if self.report else 0:.1%} sparsity, not "
                f"{self.plan.pattern.sparsity:.1%}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the plan together with the final metrics of the training."""
        self.log_outcome(trainer)

    def log_outcome(self, trainer: Trainer) -> None:
        """Log the plan together with the perplexities that the trainer measured last."""
        if self.report is None or not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "perplexity" in name}
        for logger in trainer.loggers:
            log_outcome(logger, self.report, metrics)

    def _asked(self) -> dict[str, Any]:
        """Return the settings that determine the masks, as plain data."""
        return {
            "plan": self.plan.describe(),
            "schedule": repr(self.schedule),
            "allocation": self.allocation,
            "regrowth": self.regrowth,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the latest pruning, its report and the packed masks."""
        report = self.report
        return {
            "pruned_at": self.pruned_at,
            "asked": self._asked(),
            "report": report.as_dict() if report else None,
            "masks": {layer.name: layer.mask.bits for layer in report.layers} if report else {},
            "mask_shapes": {layer.name: list(layer.mask.shape) for layer in report.layers} if report else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by ``state_dict``; raise ``InputError`` if plan or schedule differ."""
        with restoring(self):
            if found := list(differences(state_dict.get("asked", self._asked()), self._asked())):
                raise InputError(
                    f"cannot resume from this checkpoint: {'; '.join(found[:3])}; give the plan and schedule that it "
                    "was written with, or start again without --ckpt_path"
                )
            self.pruned_at = state_dict["pruned_at"]
            masks = restored_masks(state_dict["masks"], state_dict["mask_shapes"])
            content = state_dict["report"]
            self.report = PruningReport.from_dict(content, masks) if content else None


def _calibration(trainer: Trainer) -> list[Tensor]:
    datamodule = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "calibration_batches"):
        raise InputError(
            f"the data module is {type(datamodule).__name__}: pruning needs one with calibration_batches(), such as "
            "TextDataModule"
        )
    return datamodule.calibration_batches()  # type: ignore[union-attr]


def find_prune(trainer: Trainer) -> Prune:
    """Return the trainer's only ``Prune`` callback; raise ``InputError`` if there is not exactly one."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, Prune)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise InputError(
            f"trainer.callbacks has {len(found)} Prune callbacks: exactly one is needed, such as --plan wanda"
        )
    return found[0]
