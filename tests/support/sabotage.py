"""Trainings of a cell that are killed, or have a part of mask keeping switched off."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prune.callbacks import KeepMasks, keep_masks
from lit_prune.callbacks.keep_masks import find_keep_masks
from lit_prune.sharding import parameters
from support.cells import train


class Kill(Callback):
    """Kills each process with SIGKILL after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Audit(Callback):
    """Audits on demand: before the first step and after every batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        find_keep_masks(trainer).audit(trainer, pl_module)  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.on_train_start(trainer, pl_module)


def leave_gradients_alone() -> None:
    """Switch the masking of gradients off."""
    KeepMasks._masked = staticmethod(lambda mask: lambda gradient: gradient)  # type: ignore[method-assign]
    keep_masks.mask_gradient = lambda *_: None  # type: ignore[assignment]


def leave_masters_alone() -> None:
    """Let prunings change live weights only, and no masters and moments."""
    live = ("weight", "gathered weight")

    def zero_live(parameter: Any, keep: Any, optimizer: Any = None) -> None:
        for share in parameters.shards(parameter, optimizer):
            if share.place in live:
                share.write(share.read().masked_fill_(~share.cut(keep), 0.0))

    parameters._VALUES = live  # type: ignore[assignment]
    keep_masks.zero_pruned = zero_live


MUTATIONS = {"gradients": leave_gradients_alone, "masters": leave_masters_alone}


def train_and_kill(cell: str, folder: Path, step: int) -> None:
    """Train a cell until a step."""
    train(cell, folder, [Kill(step)])


def train_and_leave_alone(cell: str, folder: Path, part: str) -> None:
    """Train a cell without one of ``MUTATIONS``, and audit its masks before the first step and after every batch."""
    MUTATIONS[part]()
    train(cell, folder, [Audit()])
