"""A Trainer with additional stages: prune, analyze, evaluate, speed and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lit_prune.callbacks import TrainingProgress
from lit_prune.callbacks.combinations import check_averages, check_callbacks
from lit_prune.commands import analyze, evaluate, export, prune, speed
from lit_prune.commands.checks import (
    check_checkpoint,
    check_durations,
    check_folders,
    check_last,
    check_losses,
    check_settings,
)
from lit_prune.reporting.report import Recipe


class PruningTrainer(Trainer):
    """Lightning's Trainer, extended to prune, analyze and export, and that does not run code from checkpoints."""

    recipe: Recipe | None = None
    """Command and configuration that started the run; None if it was not started from the command line."""
    quiet: bool = False
    """Whether progress and tables are hidden."""

    prune = prune.prune
    analyze = analyze.analyze
    evaluate = evaluate.evaluate
    speed = speed.speed
    export = export.export

    def __init__(self, **kwargs: Any) -> None:
        """Initialize the parent class; raise ``InputError`` if callbacks are incompatible with each other."""
        callbacks = kwargs.get("callbacks") or []
        callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        check_callbacks(callbacks)
        check_durations(kwargs)
        if kwargs.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(TrainingProgress())
        kwargs["callbacks"] = callbacks
        super().__init__(**kwargs)  # the command line finds the parent's arguments by this very form
        check_averages(self)

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        trust: bool = False,
    ) -> None:
        """Trains a model and prunes it on schedule.

        Args:
            model: The language model.
            train_dataloaders: Training data, if there is no data module.
            val_dataloaders: Validation data, if there is no data module.
            datamodule: Data module with the training and validation text.
            ckpt_path: Checkpoint to resume from: a file, or the folder of a sharded checkpoint.
            trust: Load the checkpoint even if it holds more than tensors and plain data, which may run code.
        """
        check_settings(self)
        check_folders(self)
        weights_only = check_checkpoint(self, ckpt_path, trust)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def validate(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        trust: bool = False,
    ) -> Any:
        """Evaluates a model on the validation text.

        Args:
            model: The language model.
            dataloaders: Evaluation data, if there is no data module.
            ckpt_path: Checkpoint to load the weights from: a file, or the folder of a sharded checkpoint.
            verbose: Print the result.
            datamodule: Data module with the evaluation text.
            trust: Load the checkpoint even if it holds more than tensors and plain data, which may run code.
        """
        check_folders(self)
        check_last(self, ckpt_path)
        weights_only = check_checkpoint(self, ckpt_path, trust)
        found = super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        check_losses(found)
        return found

    def test(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        trust: bool = False,
    ) -> Any:
        """Evaluates a model on the test text.

        Args:
            model: The language model.
            dataloaders: Evaluation data, if there is no data module.
            ckpt_path: Checkpoint to load the weights from: a file, or the folder of a sharded checkpoint.
            verbose: Print the result.
            datamodule: Data module with the evaluation text.
            trust: Load the checkpoint even if it holds more than tensors and plain data, which may run code.
        """
        check_folders(self)
        check_last(self, ckpt_path)
        weights_only = check_checkpoint(self, ckpt_path, trust)
        found = super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        check_losses(found)
        return found
