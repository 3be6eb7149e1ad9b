"""LightningModule of a causal language model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from lit_prune.checkpoint.peft_format import has_adapters
from lit_prune.checkpoint.training_checkpoints import check_kept_paths
from lit_prune.errors import InputError, first_line
from lit_prune.models.experts import take_apart
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.models.weights import check_finite
from lit_prune.pruning.journal import differences
from lit_prune.sharding.offload import names_on_disk
from lit_prune.training.data import validation_names
from lit_prune.training.losses import LanguageModelLoss, Loss, Student, next_token_loss
from lit_prune.training.recovery import Everything, Trainable
from lit_prune.training.schedules import WarmupCosine
from lit_prune.training.strategies import shard, sharding_of_frozen

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class LitCausalLM(LightningModule):
    """Trains and evaluates any ``AutoModelForCausalLM``.

    .. code-block:: yaml

        model:
          pretrained: HuggingFaceTB/SmolLM2-135M
          dtype: float32  # of what trains; trainer.precision: bf16-mixed makes it fast
          optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4, weight_decay: 0.1}}
          lr_scheduler: {class_path: lit_prune.training.schedules.WarmupCosine, init_args: {warmup: 20}}
          trainable: {class_path: LoRA, init_args: {rank: 16}}
          loss: {class_path: Distillation, init_args: {teacher: HuggingFaceTB/SmolLM2-135M}}
    """

    def __init__(
        self,
        pretrained: str,
        dtype: DtypeName = "auto",
        gradient_checkpointing: bool = False,
        trainable: Trainable | None = None,
        loss: Loss | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        config: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        lazy: str | None = None,
    ) -> None:
        """Store the arguments; the model is loaded by ``configure_model``.

        Args:
            pretrained: Hub name, local Hugging Face folder, GGUF file, or ``random`` for random weights.
            dtype: Dtype of the weights; ``auto`` = as stored.
            gradient_checkpointing: Recompute activations in the backward pass, to save memory.
            trainable: Parameters to train; null = Everything.
            loss: Training loss; null = LanguageModelLoss.
            optimizer: Any torch optimizer.
            lr_scheduler: Any torch learning-rate scheduler, stepped after every optimizer step; null = constant rates.
            config: Configuration of a ``random`` model: its ``model_type`` and any value of that model's config.
            trust_remote_code: Run code that comes with the model.
            lazy: Folder for changed blocks. The model stays on disk and each block is loaded while it is pruned, for
                models that do not fit into memory; null = the whole model is loaded.
        """
        super().__init__()
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.trainable = trainable or Everything()
        self.loss = loss or LanguageModelLoss()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.config = config
        self.trust_remote_code = trust_remote_code
        self.lazy = lazy
        self.model: Any = None
        self._mean_losses: list[MeanMetric] = []
        self._batch_start = 0.0
        self._steppers: dict[str, str | None] = {"model.trainable": type(self.trainable).__name__}
        self._resumed: dict[str, str | None] = {}

    def configure_model(self) -> None:
        """Load the model on the first call."""
        if self.model is not None:
            return
        dtype = None if self.dtype_name == "auto" else getattr(torch, self.dtype_name)
        # Lightning keeps the mode (train or eval) of a module.
        self.model = load_model(self.pretrained, dtype, self.config, self.trust_remote_code, self.lazy).train()
        if has_adapters(self.pretrained):
            rank_zero_warn(
                f"model.pretrained is {self.pretrained!r}, whose plain adapters are not put on: it runs without "
                "them here, and with them after peft.PeftModel.from_pretrained"
            )
        take_apart(self.model)
        if self.lazy is not None:  # DDP would broadcast into the placeholders to synchronize them
            self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in names_on_disk(self.model)]
        if self.gradient_checkpointing:
            # transformers is renaming this method.
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable()
        self.trainable.prepare(self.model)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def load_tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return load_tokenizer(self.pretrained, self.trust_remote_code)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits ``[sequences, t, vocabulary]`` of ``input_ids`` ``[sequences, t]``."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    def on_fit_start(self) -> None:
        """Prepare the loss; raise ``InputError`` if the model stays on disk."""
        if self.lazy is not None:
            raise InputError(f"model.lazy is {self.lazy!r}: a model that stays on disk cannot be trained; leave it out")
        self._warn_of_rounding()
        self.loss.prepare(
            Student(self.model, self.load_tokenizer(), sharding_of_frozen(self.trainer.strategy, self.device_mesh))
        )

    def _warn_of_rounding(self) -> None:
        """Warn if parameters train in half precision without float32 masters."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # DeepSpeed keeps float32 masters
            return
        halves = {p.dtype for p in self.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
        for dtype in halves:
            rank_zero_warn(
                f"the trained parameters are in {dtype}, in which steps much smaller than a weight are rounded away: "
                "most weights may never change; set --model.dtype float32, and for speed --trainer.precision bf16-mixed"
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; log the loss and its terms."""
        losses = self.loss(self.model, batch["input_ids"])
        for name, value in losses.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        return losses["loss"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start timing the batch."""
        self._batch_start = self._clock()

    def _clock(self) -> float:
        """Return the time in seconds once the device has finished all submitted work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the tokens per second, summed over all processes."""
        tokens = batch["input_ids"].numel() * self.trainer.world_size
        self.log("train/tokens_per_second", tokens / (self._clock() - self._batch_start), prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        """Reset the loss of each validation text."""
        self._begin_losses(len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Reset the test loss."""
        self._begin_losses(len(self.trainer.num_test_batches))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to the loss of its validation text."""
        self._add_loss(batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to the test loss."""
        self._add_loss(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/perplexity``; for additional texts, with ``/NAME`` appended."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        self._log_losses("val", getattr(datamodule, "other_val", ()))

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/perplexity``."""
        self._log_losses("test", ())

    def _begin_losses(self, texts: int) -> None:
        # By default torchmetrics skips a batch whose loss is NaN, and averages the others.
        self._mean_losses = [MeanMetric(nan_strategy=math.nan).to(self.device) for _ in range(texts)]

    def _add_loss(self, batch: Mapping[str, Tensor], text: int) -> None:
        # torchmetrics' own Perplexity takes the log of a softmax, which is -inf for a token to which a badly pruned
        # model assigns a very low probability; the mean cross-entropy is the same quantity without the underflow.
        input_ids = batch["input_ids"]
        self._mean_losses[text].update(next_token_loss(self(input_ids), input_ids), weight=input_ids[:, 1:].numel())

    def _log_losses(self, stage: str, others: Sequence[str]) -> None:
        suffixes = ["", *(f"/{name}" for name in validation_names(others))]
        for index, metric in enumerate(self._mean_losses):
            suffix = suffixes[index] if index < len(suffixes) else f"/{index}"  # the text has no known name
            loss = metric.compute()
            values = {f"{stage}/loss{suffix}": loss, f"{stage}/perplexity{suffix}": loss.double().exp()}
            self.log_dict(values, prog_bar=not index, sync_dist=True)
        self._mean_losses = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the class names of ``trainable``, optimizer and scheduler, which are checked on resuming."""
        checkpoint["steppers"] = self._steppers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ``InputError`` for the state of another optimizer or scheduler, or for unsafe checkpoint paths."""
        check_kept_paths(checkpoint.get("callbacks", {}))
        for name, value in checkpoint.get("state_dict", {}).items():
            check_finite(name, value, "the checkpoint")
        self._resumed = checkpoint.get("steppers", {})
        self._check_resumed()
        if self.trainer.state.fn == TrainerFn.FITTING and self.trainer.strategy.lightning_restore_optimizer:
            scheduled = int(self._resumed.get("model.lr_scheduler") is not None)
            for name, count in (("optimizer_states", 1), ("lr_schedulers", scheduled)):
                if len(checkpoint.get(name, ())) != count or name not in checkpoint:
                    raise InputError(
                        f"cannot resume from this checkpoint: it holds no {name}, as save_weights_only leaves them "
                        "out, or is damaged; export it, and train the folder as --model.pretrained"
                    )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of a checkpoint; raise ``InputError`` if they belong to another model."""
        for name, own in self.state_dict().items():
            given = state_dict.get(name, own)
            if own.is_floating_point() != given.is_floating_point():
                raise InputError(f"the checkpoint holds {name} as {given.dtype}, and the model as {own.dtype}")
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise InputError(
                f"the checkpoint is not of the model {self.pretrained!r} that trains {type(self.trainable).__name__} "
                f"({' '.join(str(error).split())[:300]})"
            ) from error

    def _check_resumed(self) -> None:
        if not (self._resumed and self._steppers and self.trainer.state.fn == TrainerFn.FITTING):
            return
        both = self._resumed.keys() & self._steppers.keys()
        before, now = ({name: steppers[name] for name in both} for steppers in (self._resumed, self._steppers))
        if found := list(differences(before, now)):
            raise InputError(
                f"cannot resume from this checkpoint: {'; '.join(found)}; use the settings it was written with, or "
                "start again without --ckpt_path"
            )

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, if configured, the learning-rate scheduler."""
        trains = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            optimizer = self.optimizer(trains)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"model.optimizer cannot be used: {first_line(error)}") from error
        for group in optimizer.param_groups:
            if not 0 <= float(group["lr"]) < math.inf:
                raise InputError(f"model.optimizer has the learning rate {group['lr']}: give a number, such as 1.0e-4")
        scheduler = self._scheduler(optimizer)
        self._steppers |= {
            "model.optimizer": type(optimizer).__name__,
            "model.lr_scheduler": None if scheduler is None else type(scheduler).__name__,
        }
        self._check_resumed()
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, WarmupCosine):
            scheduler.fill_total(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the learning-rate scheduler; None if none is configured."""
        if self.lr_scheduler is None:
            return None
        try:
            return self.lr_scheduler(optimizer)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"model.lr_scheduler cannot be used: {first_line(error)}") from error
