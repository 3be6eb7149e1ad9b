"""Show the progress of a training: as a bar on a terminal, as a line per validation elsewhere."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from typing_extensions import override

from lit_prune.callbacks.keep_masks import find_keep_masks
from lit_prune.ops.masks import sparsity_of

_LINE = ("train/loss", "val/perplexity")
"""Metrics in the line after a validation."""


class TrainingProgress(RichProgressBar):
    """Shows the optimizer step, the sparsity and the losses of a training.

    On a terminal it is a bar; elsewhere, as in a log file, a line after each validation. The trainer adds it unless
    there is another progress bar.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: TrainingProgress, init_args: {refresh_rate: 10}}]}
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        """Keep the arguments.

        Args:
            refresh_rate: Batches between two updates; 0 = no progress bar.
            leave: Keep the progress bar of every epoch on the screen.
        """
        super().__init__(refresh_rate, leave)
        self._shown: tuple[Any, float] = ({}, 0.0)
        """The masks that were last shown, and their sparsity."""

    @property
    @override
    def is_enabled(self) -> bool:
        # The thread that redraws a bar delays the end of every evaluation by up to a second, seen or not.
        return bool(super().is_enabled) and Console().is_terminal

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the version of the log folder
        return {"step": _step(trainer), **self._sparsity(trainer), **metrics}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or Console().is_terminal:
            return
        figures = {name: f"{value:.4g}" for name, value in trainer.callback_metrics.items() if name in _LINE}
        line = {"step": _step(trainer), **self._sparsity(trainer), **figures}
        if trainer.is_global_zero:
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)

    def _sparsity(self, trainer: Trainer) -> dict[str, str]:
        keeper = find_keep_masks(trainer)
        if keeper is None or not keeper.masks:
            return {}
        if keeper.masks is not self._shown[0]:
            self._shown = (keeper.masks, sparsity_of(keeper.masks.values()))
        return {"sparsity": f"{self._shown[1]:.1%}"}

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning counts to epoch -2 if a training ends after a number of steps.
        return str(super()._get_train_description(current_epoch)).replace("/-2", "")


def _step(trainer: Trainer) -> str:
    return f"{trainer.global_step}/{trainer.max_steps}" if trainer.max_steps > 0 else str(trainer.global_step)
