"""Helpers shared by the commands: place a model on its device, print tables and names of written files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import nn

from lit_prune.checkpoint.masks import check_masks_hold
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask
from lit_prune.training import LitCausalLM

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer


@contextmanager
def on_device(trainer: PruningTrainer, model: LitCausalLM) -> Iterator[nn.Module]:
    """Yield the transformers model on the strategy's device, in evaluation mode."""
    device, training = model.device, model.model.training
    try:
        yield model.model.to(trainer.strategy.root_device).eval()
    finally:
        model.model.train(training).to(device)


def show(trainer: PruningTrainer, tables: Sequence[Table], folder: Path) -> None:
    """Print tables and the path of every file in ``folder``."""
    console = Console(quiet=trainer.quiet)
    console.print(*tables)
    for file in sorted(folder.iterdir()):
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)


def check_sparse(model: nn.Module, masks: Mapping[str, PackedMask], source: str) -> None:
    """Raise ``InputError`` if the weights of a model that was loaded are not as sparse as the masks beside them."""
    try:
        check_masks_hold(model, masks)
    except RuntimeError as error:
        raise InputError(f"{source!r}: {error}; its weights or its masks were changed") from error


def refuse_lazy(model: LitCausalLM, stage: str) -> None:
    """Raise ``InputError`` if the model is offloaded to disk."""
    if model.lazy is not None:
        raise InputError(f"model.lazy is {model.lazy!r}: {stage} needs the model whole; leave it out")
