"""Validate before the first training step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_prune.errors import InputError
from lit_prune.internals.lightning import save_if_best


class ValidateAtStart(Callback):
    """Validates the model before the first training step, after a pruning at step 0.

    Without this callback the first validation is after ``trainer.val_check_interval`` steps, and the gain from
    training cannot be measured. ``EarlyStopping`` compares with the initial result, and a ``ModelCheckpoint`` with a
    monitor saves the initial model: if training does not improve it, ``Export`` with ``best`` writes that model.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: ValidateAtStart}]}
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ``InputError`` if validation is disabled."""
        if stage == "fit" and not trainer.limit_val_batches:
            raise InputError("trainer.limit_val_batches is 0, so ValidateAtStart has nothing to do: remove one of them")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the validation loop in the same way as between two training steps."""
        if trainer.global_step > 0:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        self._save(trainer)

    @staticmethod
    def _save(trainer: Trainer) -> None:
        """Save the initial model with every ``ModelCheckpoint`` that has a monitor; by default they skip step 0."""
        fresh = [optimizer for optimizer in trainer.optimizers if not optimizer.state]
        for checkpoint in trainer.checkpoint_callbacks:
            if not isinstance(checkpoint, ModelCheckpoint) or trainer.fast_dev_run:  # type: ignore[attr-defined]
                continue
            save_if_best(checkpoint, trainer)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for optimizer in fresh:  # to save its state, torch took a step of length 0, which would be counted
                optimizer.state.clear()
