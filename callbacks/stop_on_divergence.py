"""End a training that has gone wrong, in words."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_prune.callbacks.states import restoring
from lit_prune.errors import InputError, NumericalError
from lit_prune.pruning import PruningReport


class DivergedError(NumericalError):
    """The loss is not finite, or far above what it was."""


class StopOnDivergence(Callback):
    """Stops at a loss that is NaN or infinite, or whose mean over some batches has grown to a multiple of its lowest.

    It stops before the backward pass, so no such loss reaches the weights. Checkpoints stay where they are, and
    ``Export`` with ``best`` writes the best one. A pruning begins the comparison anew.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: StopOnDivergence, init_args: {factor: 3.0}}]}
    """

    def __init__(self, factor: float = 3.0, window: int = 20) -> None:
        """Validate and keep the arguments.

        Args:
            factor: How many times its lowest mean the loss may reach.
            window: Batches in a mean.
        """
        if factor <= 1:
            raise InputError(f"StopOnDivergence.factor is {factor}: it must be above 1, such as 3")
        if window < 1:
            raise InputError(f"StopOnDivergence.window is {window}: it must be at least 1 batch")
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=window)
        self._lowest = math.inf

    def on_pruned(self, trainer: Trainer, pl_module: LightningModule, report: PruningReport) -> None:
        """Forget the losses of the model with fewer pruned weights."""
        self._losses.clear()
        self._lowest = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far, so that a resumed training stops where one at a stretch does."""
        return {"losses": list(self._losses), "lowest": self._lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        with restoring(self):
            self._losses.extend(state_dict["losses"])
            self._lowest = state_dict["lowest"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise ``DivergedError`` in all processes where the loss of one of them has."""
        value = loss.item() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        value /= scaler.get_scale() if scaler else 1.0  # 16-mixed scales the loss before this hook
        self._losses.append(value)
        mean = sum(self._losses) / len(self._losses)
        if len(self._losses) == self._losses.maxlen:
            self._lowest = min(self._lowest, mean)
        diverged = not math.isfinite(value) or mean > self.factor * self._lowest
        if trainer.strategy.reduce_boolean_decision(diverged, all=False):
            raise DivergedError(
                f"training diverged at step {trainer.global_step}: the loss is {value:.4g}, its mean over "
                f"{len(self._losses)} batches {mean:.4g} and {self._lowest:.4g} at its lowest, at the learning rate "
                f"{trainer.optimizers[0].param_groups[0]['lr']:.3g}: lower it, or warm up for longer; "
                f"{_best(trainer)}"
            )


def _best(trainer: Trainer) -> str:
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return f"the best checkpoint is kept: {path}" if path else "no checkpoint had been written"
