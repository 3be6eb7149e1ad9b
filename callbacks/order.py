"""Order of callbacks: Lightning calls them in the order of its list."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint


def run_last(trainer: Trainer, callback: Callback) -> None:
    """Move a callback behind all others except checkpoint callbacks, so that it runs after their changes.

    Assigns a new list. A running hook continues over the old one, so it is safe to call this in ``setup``.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [other for other in callbacks if other is not callback]
    saving = [other for other in others if isinstance(other, Checkpoint)]
    others = [other for other in others if not isinstance(other, Checkpoint)]
    trainer.callbacks = [*others, callback, *saving]  # type: ignore[attr-defined]
