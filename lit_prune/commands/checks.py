"""Checks of the Trainer's settings and of a checkpoint, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.checkpoint.outputs import check_folder_for
from lit_prune.checkpoint.training_checkpoints import check_is_checkpoint, check_trusted
from lit_prune.errors import InputError, first_line
from lit_prune.training.strategies import FSDP2, DeepSpeed

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer

_NOT_ZERO = ("val_check_interval", "limit_train_batches")


def check_settings(trainer: PruningTrainer) -> None:
    """Raise ``InputError`` for invalid training settings that Lightning accepts without an error."""
    least = {
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
        "val_check_interval": 0.0,
        "log_every_n_steps": 0,
        "gradient_clip_val": 0,
        "num_sanity_val_steps": -1,
        "limit_train_batches": 0,
        "min_steps": 0,
        "min_epochs": 0,
    }
    for name, lowest in least.items():
        value = getattr(trainer, name)
        if isinstance(value, (int, float)) and (value < lowest or (value == 0 and name in _NOT_ZERO)):
            raise InputError(f"trainer.{name} is {value}: it must be {'above 0' if name in _NOT_ZERO else lowest}")


def check_folders(trainer: PruningTrainer) -> None:
    """Raise ``InputError`` if a folder for logs or checkpoints cannot be created."""
    folders = {logger.save_dir for logger in trainer.loggers}
    folders |= {trainer.default_root_dir} if trainer.checkpoint_callbacks else set()
    for folder in folders:
        if folder and "://" not in str(folder):
            check_folder_for("trainer.default_root_dir or a logger's folder", folder)


def check_checkpoint(trainer: PruningTrainer, ckpt_path: str | Path | None, trust: bool) -> bool | None:
    """Raise ``InputError`` for a checkpoint that would run code; return Lightning's ``weights_only``."""
    if isinstance(trainer.strategy, (DeepSpeed, FSDP2)):
        trainer.strategy.trusted = trust
    if ckpt_path is None:
        return None
    try:
        exists = Path(ckpt_path).expanduser().exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"ckpt_path is {str(ckpt_path)[:200]!r}: it cannot be read ({first_line(error)})") from error
    if not str(ckpt_path):
        raise InputError("ckpt_path is empty: name a checkpoint")
    if exists:
        check_trusted(ckpt_path, trust)
        check_is_checkpoint(ckpt_path, trust)
    elif not (trust or isinstance(trainer.strategy, (DeepSpeed, FSDP2))) and isinstance(
        trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)
    ):  # Lightning's own strategies do not check what they load
        raise InputError(f"ckpt_path is {str(ckpt_path)!r}: give the folder of the checkpoint, or add --trust")
    return not trust


def drop_unwritable_logs(trainer: PruningTrainer) -> None:
    """Disable logging, with a warning, if a logger's folder is not writable, because pruning does not need it."""
    for logger in trainer.loggers:
        folder = logger.save_dir
        try:
            Path(folder or ".").mkdir(parents=True, exist_ok=True)
            writable = os.access(folder or ".", os.W_OK)
        except (OSError, ValueError):
            writable = False
        if not writable:
            rank_zero_warn(f"trainer.default_root_dir is {folder!r}, which cannot be written: nothing is logged")
            trainer.loggers = []
            return
