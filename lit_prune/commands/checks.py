"""Checks of the Trainer's settings and of a checkpoint, before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.checkpoint.outputs import check_folder_for
from lit_prune.checkpoint.training_checkpoints import check_is_checkpoint, check_trusted
from lit_prune.errors import InputError, NumericalError, first_line
from lit_prune.training.strategies import FSDP2, DeepSpeed

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer

_NOT_ZERO = ("val_check_interval", "limit_train_batches")
_DURATIONS = ("max_time", "val_check_interval")
_UNITS = ("weeks", "days", "hours", "minutes", "seconds")
_CLOCK = re.compile(r"\d+:\d\d:\d\d:\d\d")
_LONGEST = 10**6
"""Upper bound of a number of weeks, days and so on; ``timedelta`` ends at 10^9 days."""


def check_durations(settings: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for an invalid duration among the Trainer's arguments; Lightning's error names no option."""
    for name in _DURATIONS:
        value = settings.get(name)
        units = value if isinstance(value, Mapping) else {}
        invalid = set(units) - set(_UNITS) or any(not 0 <= amount < _LONGEST for amount in units.values())
        if invalid or (isinstance(value, str) and not _CLOCK.fullmatch(value)):
            raise InputError(
                f"trainer.{name} is {value!r}: give DD:HH:MM:SS, such as '00:12:00:00' for half a day, or units "
                f"among {', '.join(_UNITS)}, such as {{hours: 12}}"
            )


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
    if "://" in str(ckpt_path) and not trust:
        raise InputError(f"ckpt_path is {str(ckpt_path)!r}: only a local file or folder can be checked; or add --trust")
    if exists:
        check_trusted(ckpt_path, trust)
        check_is_checkpoint(ckpt_path, trust)
    elif not (trust or isinstance(trainer.strategy, (DeepSpeed, FSDP2))) and isinstance(
        trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)
    ):  # Lightning's own strategies do not check what they load
        raise InputError(f"ckpt_path is {str(ckpt_path)!r}: give the folder of the checkpoint, or add --trust")
    return not trust


def check_last(trainer: PruningTrainer, ckpt_path: str | Path | None) -> None:
    """Raise ``InputError`` for ``last`` without such a checkpoint: Lightning would evaluate the untrained model."""
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if ckpt_path == "last" and not any(folder and any(Path(folder).glob("last*")) for folder in folders):
        raise InputError("ckpt_path is 'last', and no ModelCheckpoint has one: name the file or folder of a checkpoint")


def check_losses(found: Iterable[Mapping[str, float]]) -> None:
    """Raise ``NumericalError`` if a loss of an evaluation is NaN."""
    for results in found:
        for name, value in results.items():
            if math.isnan(value):
                raise NumericalError(f"{name} is NaN: the model, its configuration or its precision is unusable")


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
