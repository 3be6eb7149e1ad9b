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
from lit_prune.ops import PackedMask
from lit_prune.ops.masks import restored_masks
from lit_prune.pruning import OneShot, PruningPlan, PruningReport, Schedule, prune
from lit_prune.pruning.journal import differences
from lit_prune.pruning.preflight import preflight
from lit_prune.pruning.progress import progress


@dataclass(frozen=True)
class _Request:
    """What a pruning is asked to do: arguments of ``prune``."""

    plan: PruningPlan
    journal_folder: Path | None = None
    resume: bool = False
    sparsity: float | None = None
    allocation: Mapping[str, float] | None = None
    allowed: Mapping[str, PackedMask] | None = None


@runtime_checkable
class PruningListener(Protocol):
    """A callback that is told when a model in training has been pruned."""

    def on_pruned(self, trainer: Trainer, pl_module: LightningModule, report: PruningReport) -> None:
        """Act on it; weights and masks are the same in every process by now."""


class Prune(Callback):
    """Prunes at the steps of a schedule while a model is trained, or once for ``lit-prune prune``.

    The calibration set is the data module's. ``KeepMasks`` keeps pruned weights at zero between and after prunings.

    On the command line ``plan`` and ``schedule`` are options of their own, of which this callback is made. Written out:

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
        """Validate and keep the arguments.

        Args:
            plan: What to prune, how far and how.
            schedule: When, in optimizer steps; null = ``OneShot`` at the start.
            allocation: Where the schedule prunes more than once: share the sparsity out as the dense model's
                allocation says, in proportion (``frozen``), or allocate anew from the weights of the day
                (``recomputed``).
            regrowth: Let a pruning keep weights that an earlier one removed; off needs a ``frozen`` allocation.
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
        """What the latest pruning did, its masks included."""
        self.pruned_at: int | None = None
        """The optimizer step of the latest pruning."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a schedule that outlasts the training; prune if step 0 is due."""
        steps = trainer.estimated_stepping_batches
        if self.schedule.last > steps:
            raise InputError(
                f"the schedule prunes until step {self.schedule.last}, and training ends after {steps:.0f} optimizer "
                "steps: raise --trainer.max_steps or --trainer.max_epochs, or end the schedule earlier"
            )
        if self.report is None and trainer.global_step > self.schedule.last:
            raise InputError(
                f"the checkpoint is of step {trainer.global_step}, after the last pruning of the schedule (step "
                f"{self.schedule.last}), and holds no masks: give a checkpoint that Prune was part of, or begin anew "
                "without --ckpt_path"
            )
        if self.schedule.last > 0 and adapted_layers(pl_module.get_submodule("model")):
            raise InputError(
                f"the schedule prunes until step {self.schedule.last}, and adapters train: a pruning would not see "
                "what they have learned; prune at step 0 (OneShot), or train Everything"
            )
        self._prune_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune if the step just taken is due."""
        self._prune_if_due(trainer, pl_module)

    def prune(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batches: Sequence[Tensor],
        journal_folder: Path | None = None,
        resume: bool = False,
    ) -> PruningReport:
        """Prune now, as far as the plan says, outside of any schedule; return the report."""
        return self._prune(trainer, pl_module, batches, _Request(self.plan, journal_folder, resume))

    def _prune_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if self.schedule.due(step) and self.pruned_at != step:
            request = self._due_at(step)
            batches = _calibration(trainer) if request.plan.needs_data else []
            self._prune(trainer, pl_module, batches, request)
            self.pruned_at = step

    def _due_at(self, step: int) -> _Request:
        sparsity = self.schedule.sparsity(step, self.plan.pattern.sparsity)
        if self.allocation == "recomputed":
            return _Request(self.plan.at(sparsity))
        before = self.report
        return _Request(
            self.plan,
            sparsity=sparsity if sparsity != self.plan.pattern.sparsity else None,
            allocation=before.allocation if before else None,
            allowed=before.masks if before and not self.regrowth else None,
        )

    def _prune(
        self, trainer: Trainer, pl_module: LightningModule, batches: Sequence[Tensor], request: _Request
    ) -> PruningReport:
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
            self.report.metrics = before.metrics  # of the allocation that this pruning took over
        if self.report.calibration:
            self.report.calibration.text = getattr(getattr(trainer, "datamodule", None), "calibration_text", None)
        if trainer.state.fn == TrainerFn.FITTING:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, PruningListener):
                    callback.on_pruned(trainer, pl_module, self.report)
                elif isinstance(callback, EarlyStopping):  # its score is that of the model with fewer pruned weights
                    callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
                    callback.wait_count = 0
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                log_pruning(logger, self.report, before, trainer.global_step)
        return self.report

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training stopped before the schedule ended."""
        if self.pruned_at is None or self.pruned_at < self.schedule.last:
            rank_zero_warn(
                f"training stopped at step {trainer.global_step}, before the schedule prunes for the last time (step "
                f"{self.schedule.last}): the model has {self.report.sparsity if self.report else 0:.1%} sparsity, not "
                f"{self.plan.pattern.sparsity:.1%}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the plan beside the figures that the training ended with."""
        self.log_outcome(trainer)

    def log_outcome(self, trainer: Trainer) -> None:
        """Log the plan beside the perplexities that the trainer measured last."""
        if self.report is None or not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "perplexity" in name}
        for logger in trainer.loggers:
            log_outcome(logger, self.report, metrics)

    def _asked(self) -> dict[str, Any]:
        """Return what decides on the masks, as plain data."""
        return {
            "plan": self.plan.describe(),
            "schedule": repr(self.schedule),
            "allocation": self.allocation,
            "regrowth": self.regrowth,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the latest pruning, what it did, and the packed masks."""
        report = self.report
        return {
            "pruned_at": self.pruned_at,
            "asked": self._asked(),
            "report": report.as_dict() if report else None,
            "masks": {layer.name: layer.mask.bits for layer in report.layers} if report else {},
            "mask_shapes": {layer.name: list(layer.mask.shape) for layer in report.layers} if report else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; refuse what another plan or schedule has done."""
        with restoring(self):
            if found := list(differences(state_dict.get("asked", self._asked()), self._asked())):
                raise InputError(
                    f"cannot go on from this checkpoint: {'; '.join(found[:3])}; give the plan and schedule that it "
                    "was written with, or begin anew without --ckpt_path"
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
    """Return the trainer's one ``Prune`` callback, or raise ``InputError``."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, Prune)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise InputError(
            f"trainer.callbacks has {len(found)} Prune callbacks: exactly one is needed, such as --plan wanda"
        )
    return found[0]
