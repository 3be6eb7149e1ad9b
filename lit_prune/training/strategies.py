"""Multi-device strategies that support keep masks, on GPUs and, for tests and laptops, on CPUs with gloo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from lit_prune.checkpoint.training_checkpoints import plain_data_only
from lit_prune.internals.lightning import join_deepspeed_group, shard_over_all_processes, use_gloo
from lit_prune.models.blocks import find_blocks


class FSDP2(ModelParallelStrategy):
    """Shards weights, gradients and optimizer moments over all processes, block by block (``fully_shard``).

    .. code-block:: yaml

        trainer: {devices: 2, strategy: {class_path: lit_prune.training.strategies.FSDP2}}
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """Store the arguments.

        Args:
            save_distributed_checkpoint: Save a shard per process; false = gather one file on rank 0.
            process_group_backend: Backend of collective operations, nccl or gloo; null = chosen by the device.
            timeout: Timeout of a collective operation.
        """
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @override
    def setup_environment(self) -> None:
        shard_over_all_processes(self)
        super().setup_environment()

    trusted = False
    """Whether checkpoints are trusted to run code when they are loaded."""

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning does not pass ``weights_only`` from fit to this method, and the loaders ignore it.
        with nullcontext() if self.trusted else plain_data_only(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=not self.trusted)


def shard(model: nn.Module, mesh: DeviceMesh, frozen: bool = False) -> nn.Module:
    """Shard a model over the data-parallel processes of ``mesh``, one group of parameters per decoder block."""
    data_parallel = mesh["data_parallel"]
    for block in find_blocks(model):
        fully_shard(block.module, mesh=data_parallel)
    # Parameters outside the blocks stay gathered for the backward pass, which a frozen model does not have.
    if frozen:
        fully_shard(model, mesh=data_parallel, reshard_after_forward=True)
    else:
        fully_shard(model, mesh=data_parallel)
    return model


Sharding = Callable[[nn.Module], Any]
"""Function that shards a frozen model, and returns the module to call instead."""


def sharding_of_frozen(strategy: Strategy, mesh: DeviceMesh | None) -> Sharding | None:
    """Return the function that shards a frozen model like the strategy does the trained one; None = not sharded."""
    if mesh is not None:
        return partial(shard, mesh=mesh, frozen=True)
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        return partial(_partition, config=strategy.config)  # type: ignore[arg-type]
    return None


def _partition(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """Shard a frozen model's weights with the ZeRO-3 settings of the model in training."""
    import deepspeed

    zero = {name: value for name, value in config["zero_optimization"].items() if name != "offload_optimizer"}
    half = next(model.parameters()).dtype == torch.bfloat16
    engine, *_ = deepspeed.initialize(
        model=model,
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": half}},
    )
    return engine


class DeepSpeed(DeepSpeedStrategy):
    """DeepSpeed ZeRO-1, -2 or -3, on GPUs, or on CPUs with gloo.

    .. code-block:: yaml

        trainer:
          devices: 2
          strategy: {class_path: lit_prune.training.strategies.DeepSpeed, init_args: {stage: 3}}

    To offload the optimizer, and for stage 3 also the weights, to CPU memory:

    .. code-block:: yaml

        strategy:
          class_path: lit_prune.training.strategies.DeepSpeed
          init_args: {stage: 3, offload_optimizer: true, offload_parameters: true}
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        config: dict[str, Any] | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """Store the arguments.

        Args:
            stage: ZeRO stage: shard optimizer moments (1), also gradients (2), also weights (3).
            offload_optimizer: Offload optimizer moments and float32 masters to CPU memory.
            offload_parameters: Offload weights to CPU memory (stage 3).
            config: Complete DeepSpeed configuration, which replaces the arguments above; null = none.
            timeout: Timeout of a collective operation.
        """
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            config=config,
            timeout=timeout,
            logging_batch_size_per_gpu=1,
        )

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed requires a device index, which Lightning's CPU devices do not have.
        return torch.device("cpu", 0) if self._on_cpu else super().root_device

    @override
    def setup_environment(self) -> None:
        if not self._on_cpu:
            super().setup_environment()
            return
        use_gloo(self)
        # The parent class rejects CPUs; call its base class instead.
        ParallelStrategy.setup_environment(self)
        reset_seed()
        self.set_world_ranks()
        join_deepspeed_group(self)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has already divided the loss by the number of accumulated batches; DeepSpeed would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    trusted = False
    """Whether checkpoints are trusted to run code when they are loaded."""

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning does not pass ``weights_only`` from fit to this method, and the loaders ignore it.
        with nullcontext() if self.trusted else plain_data_only(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=not self.trusted)

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        # Weights are loaded unsharded and sharded when training starts: a checkpoint cannot be loaded into shards.
        yield
