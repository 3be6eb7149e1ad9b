"""Find the learning rate by a short range test."""

from __future__ import annotations

import logging

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lit_prune.errors import InputError, NumericalError


class FindLearningRate(LearningRateFinder):
    """Tries increasing learning rates on the pruned model, then trains at the rate where the loss fell fastest.

    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, in Lightning's implementation, but run after
    the masks are applied. Weights, moments and data are reset after the test. The learning rates of the optimizer and
    of its schedule are scaled so that the first parameter group trains at the rate found.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: FindLearningRate, init_args: {steps: 50}}]}
    """

    def __init__(self, lowest: float = 1e-6, highest: float = 1e-2, steps: int = 50) -> None:
        """Validate and store the arguments.

        Args:
            lowest: First learning rate of the test.
            highest: Last learning rate of the test, which stops earlier if the loss explodes.
            steps: Number of optimizer steps in the test, at least 20, with learning rates spaced logarithmically.
        """
        if not 0 < lowest < highest:
            raise InputError(f"FindLearningRate tries from {lowest} to {highest}: it must be 0 < lowest < highest")
        if steps < 20:
            raise InputError(f"FindLearningRate.steps is {steps}: it must be at least 20")
        super().__init__(min_lr=lowest, max_lr=highest, num_training_steps=steps, update_attr=False)
        self.found: float | None = None
        """Learning rate found; None before the test."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ``InputError`` if the strategy cannot restore a checkpoint in the middle of a run."""
        strategy = trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
            raise InputError(
                f"trainer.strategy is {type(strategy).__name__}: FindLearningRate works on one device and with ddp; "
                "find the rate there, and set it as the optimizer's lr"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``InputError`` if the schedule cannot be scaled; the test runs later, after the masks are applied."""
        for config in trainer.lr_scheduler_configs:
            cyclic = hasattr(config.scheduler, "max_lrs") or "max_lr" in trainer.optimizers[0].param_groups[0]
            if cyclic or not hasattr(config.scheduler, "base_lrs"):
                raise InputError(
                    f"model.lr_scheduler is {type(config.scheduler).__name__}, whose rates FindLearningRate cannot "
                    "scale: use lit_prune.training.schedules.WarmupCosine, or set the rates without FindLearningRate"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the test before the first training step."""
        if self.found is not None or trainer.global_step > 0:
            return
        self.found = 0.0  # the test itself starts an epoch and calls this hook again
        self.lr_find(trainer, pl_module)
        rate = self.optimal_lr.suggestion() if self.optimal_lr else None
        if not rate:
            raise NumericalError("FindLearningRate saw no loss fall: widen lowest and highest, or raise steps")
        self.found = rate
        logging.getLogger(__name__).info("learning rate: %.3g", rate)
        groups = trainer.optimizers[0].param_groups
        scale = rate / groups[0].get("initial_lr", groups[0]["lr"])
        for group in groups:
            for name in {"lr", "initial_lr"} & group.keys():
                group[name] *= scale
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [base * scale for base in config.scheduler.base_lrs]
