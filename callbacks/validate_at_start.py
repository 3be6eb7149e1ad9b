"""Validate before the first training step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prune.errors import InputError


class ValidateAtStart(Callback):
    """Validates the model as training begins with it, once a pruning at step 0 is done.

    Without it the first validation comes after ``trainer.val_check_interval`` steps, and nothing tells what the
    training has gained. ``EarlyStopping`` compares with it from then on.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: ValidateAtStart}]}
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that never validates."""
        if stage == "fit" and not trainer.limit_val_batches:
            raise InputError(
                "trainer.limit_val_batches is 0, so ValidateAtStart has nothing to do: leave one of them out"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the validation loop as training does between two steps."""
        if trainer.global_step > 0:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
