"""Checks for incompatible callbacks and strategies, before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_prune.errors import InputError


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise ``InputError`` if two callbacks of this package have the same class, and so the same checkpoint key."""
    kinds = Counter(type(callback) for callback in callbacks if type(callback).__module__.startswith(__package__ or ""))
    for kind, count in kinds.items():
        if count > 1:
            raise InputError(f"trainer.callbacks has {count} of {kind.__name__}: keep one")


def check_averages(trainer: Trainer) -> None:
    """Raise ``InputError`` if weights are averaged under a sharding strategy, which Lightning does not support."""
    averages = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    if averages and isinstance(trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
        raise InputError(
            f"trainer.callbacks has {type(averages[0]).__name__}, and trainer.strategy is "
            f"{type(trainer.strategy).__name__}: averages need whole weights; use ddp or one device, or leave it out"
        )
