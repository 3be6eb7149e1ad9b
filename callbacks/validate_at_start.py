"""Validate before the first training step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_prune.errors import InputError
from lit_prune.internals.lightning import save_if_best


class ValidateAtStart(Callback):
    """Validates the model as training begins with it, once a pruning at step 0 is done.

    Without it the first validation comes after ``trainer.val_check_interval`` steps, and nothing tells what the
    training has gained. ``EarlyStopping`` compares with it from then on, and a ``ModelCheckpoint`` with a monitor saves
    it: if training only does harm, ``Export`` with ``best`` writes the model that it began with.

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
        self._save(trainer)

    @staticmethod
    def _save(trainer: Trainer) -> None:
        """Offer the start to every ``ModelCheckpoint`` with a figure of it, which at step 0 saves nothing by itself."""
        fresh = [optimizer for optimizer in trainer.optimizers if not optimizer.state]
        for checkpoint in trainer.checkpoint_callbacks:
            if not isinstance(checkpoint, ModelCheckpoint) or trainer.fast_dev_run:  # type: ignore[attr-defined]
                continue
            save_if_best(checkpoint, trainer)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for optimizer in fresh:  # to save it, torch has let it take a step of length 0, which it would count
                optimizer.state.clear()
