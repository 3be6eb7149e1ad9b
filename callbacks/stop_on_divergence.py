"""Stop a diverging training run with an explanatory error."""

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
    """The loss is not finite, or far above its lowest mean."""


class StopOnDivergence(Callback):
    """Stops training if the loss is NaN or infinite, or if its running mean exceeds a multiple of its lowest value.

    The run stops before the backward pass, so that the loss does not affect the weights. Checkpoints are not deleted,
    and ``Export`` with ``best`` writes the best one. The comparison is reset at each pruning.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: StopOnDivergence, init_args: {factor: 3.0}}]}
    """

    def __init__(self, factor: float = 3.0, window: int = 20) -> None:
        """Validate and store the arguments.

        Args:
            factor: Maximum ratio of the mean loss to its lowest value so far; above 1.
            window: Number of batches in the running mean.
        """
        if factor <= 1:
            raise InputError(f"StopOnDivergence.factor is {factor}: it must be above 1, such as 3")
        if window < 1:
            raise InputError(f"StopOnDivergence.window is {window}: it must be at least 1 batch")
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=window)
        self._lowest = math.inf

    def on_pruned(self, trainer: Trainer, pl_module: LightningModule, report: PruningReport) -> None:
        """Discard the losses of the previous, less sparse model."""
        self._losses.clear()
        self._lowest = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far, so that a resumed run stops at the same step as an uninterrupted one."""
        return {"losses": list(self._losses), "lowest": self._lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by ``state_dict``."""
        with restoring(self):
            self._losses.extend(state_dict["losses"])
            self._lowest = state_dict["lowest"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise ``DivergedError`` on every process if the loss has diverged on any of them."""
        value = loss.item() * trainer.accumulate_grad_batches  # undo Lightning's division
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
