"""Learning-rate schedules that depend on the length of the training."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_prune.errors import InputError


class WarmupCosine(LRScheduler):
    """Linear warm-up for ``warmup`` steps, then cosine decay to ``final`` times the learning rate at the last step.

    Step k (from 0) has the factor ``(k + 1) / warmup`` while ``k < warmup``, then
    ``final + (1 - final) (1 + cos(π (k - warmup) / (total - warmup))) / 2``.

    .. code-block:: yaml

        model:
          optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4}}
          lr_scheduler: {class_path: lit_prune.training.schedules.WarmupCosine, init_args: {warmup: 20}}
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 0, final: float = 0.0, total: int | None = None) -> None:
        """Validate and store the arguments.

        Args:
            optimizer: Optimizer whose learning rates are scheduled.
            warmup: Number of optimizer steps of the linear warm-up.
            final: Learning rate at the last step, as a fraction of the base learning rate, in [0, 1].
            total: Total number of optimizer steps, including the warm-up; null = as many as the trainer takes.
        """
        if warmup < 0:
            raise InputError(f"WarmupCosine.warmup is {warmup}: it must be 0 or more optimizer steps")
        if not 0 <= final <= 1:
            raise InputError(f"WarmupCosine.final is {final}: it must be in [0, 1], such as 0.1")
        if total is not None and total < max(warmup, 1):
            raise InputError(f"WarmupCosine.total is {total}: it must be at least 1, and at least warmup, {warmup}")
        self.warmup = warmup
        self.final = final
        self.total = total
        super().__init__(optimizer)

    def fill_total(self, steps: float) -> None:
        """Set ``total`` to the trainer's number of optimizer steps, unless it was given."""
        if self.total is not None:
            return
        if not math.isfinite(steps):
            raise InputError("WarmupCosine needs to know when training ends: set --trainer.max_steps, or its total")
        self.total = int(steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the progress, but not the total, because a resumed training may take more steps."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "total"})
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the next step."""
        return [rate * self._factor(self.last_epoch) for rate in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.total is None:  # the first step, before ``fill_total``
            return 1.0
        time = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * time)) / 2
