"""Private names of Lightning."""

from __future__ import annotations

from typing import Any

OVERRIDDEN = {
    "LightningCLI": ("_dump_config", "_parse_ckpt_path", "_set_seed"),
    "RichProgressBar": ("_get_train_description",),
}
"""Overridden methods: ``LightningCLI`` has no hook between parsing and seeding, reads a checkpoint's hyperparameters
before it can be checked, and takes a tenth of a second to write down hyperparameters that no module saves;
``RichProgressBar`` has no other place for the epoch's name."""


def subparser(cli: Any, subcommand: str | None) -> Any:
    """Return the parser of a subcommand, or of the program if None; the public attribute is always the latter."""
    return cli._parser(subcommand)


def config_value(cli: Any, config: Any, key: str) -> Any:
    """Return a configuration value of the running subcommand, or of the whole configuration if there is none."""
    return cli._get(config, key)


def save_if_best(checkpoint: Any, trainer: Any) -> None:
    """Make a ``ModelCheckpoint`` save the model at step 0, at which its own hooks save nothing."""
    metrics = checkpoint._monitor_candidates(trainer)
    if checkpoint.monitor in metrics:
        checkpoint._save_topk_checkpoint(trainer, metrics)


def average_model(callback: Any) -> Any:
    """Return the averaged module of a ``WeightAveraging``; None before training. No hook is called when it changes."""
    return callback._average_model


def shard_over_all_processes(strategy: Any) -> None:
    """Make a ``ModelParallelStrategy`` shard over all processes; by default it splits matrices within a node."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


def use_gloo(strategy: Any) -> None:
    """Set the gloo backend of a strategy whose constructor has no such argument."""
    strategy._process_group_backend = "gloo"


def join_deepspeed_group(strategy: Any) -> None:
    """Join DeepSpeed's process group like ``DeepSpeedStrategy.setup_environment``, which rejects CPUs."""
    strategy._init_deepspeed_distributed()
