"""Train a cell of scripts/bench/masks_matrix.py, killed, resumed, or with a part of mask keeping switched off."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import masks_matrix

from lit_prune.callbacks import KeepMasks, keep_masks
from lit_prune.callbacks.keep_masks import find_keep_masks
from lit_prune.models import access


class Kill(Callback):
    """Kills all processes with SIGKILL after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            for process in getattr(trainer.strategy.launcher, "procs", []):
                process.kill()
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
        for share in access.shares(parameter, optimizer):
            if share.place in live:
                share.write(share.read().masked_fill_(~share.cut(keep), 0.0))

    access._VALUES = live  # type: ignore[assignment]
    keep_masks.zero_pruned = zero_live


MUTATIONS = {"gradients": leave_gradients_alone, "masters": leave_masters_alone}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cell", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--leave-alone", choices=MUTATIONS)
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args()
    callbacks: list[Callback] = []
    if options.leave_alone:
        MUTATIONS[options.leave_alone]()
        callbacks.append(Audit())
    if options.kill_after:
        callbacks.append(Kill(options.kill_after))
    masks_matrix.train(options.cell, options.out, callbacks, options.resume)


if __name__ == "__main__":
    main()
