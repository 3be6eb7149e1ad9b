"""Time the layers of a pruned model in dense and sparse form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from lit_prune.checkpoint.files import write_json
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.outputs import check_file
from lit_prune.commands.output import check_sparse, on_device, refuse_lazy
from lit_prune.errors import InputError
from lit_prune.options import as_list
from lit_prune.reporting.tables import speed_table
from lit_prune.runtime.sparse_layers import Speed, measure_speed
from lit_prune.training import LitCausalLM, TextDataModule

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer

_MOST_ROWS = 1_000_000


def speed(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    tokens: Sequence[int] | int = (1, 16, 256),
    output: str | None = None,
    overwrite: bool = False,
) -> list[Speed]:
    """Times one layer of each shape on this machine, dense and in torch's sparse formats.

    Args:
        trainer: Trainer whose device is used.
        model: A pruned folder, in the dtype to be used for inference.
        datamodule: Not used.
        tokens: Numbers of input rows to time: 1 as in generation, token by token; hundreds as in a prompt.
        output: JSON file to write the timings to; null = none.
        overwrite: Replace the file if it exists.
    """
    refuse_lazy(model, "speed")
    file = None if output is None else check_file(output, ".json", overwrite, [model.pretrained])
    tokens = as_list(tokens)
    if not tokens or not all(1 <= rows <= _MOST_ROWS for rows in tokens):
        raise InputError(f"tokens are {list(tokens)}: give numbers from 1 to {_MOST_ROWS:,}, such as [1, 16, 256]")
    masks = load_masks(model.pretrained)
    model.configure_model()
    check_sparse(model.model, masks, model.pretrained)
    with on_device(trainer, model) as whole:
        found = measure_speed(whole, masks, tokens)
    Console(quiet=trainer.quiet).print(speed_table(found))
    if file is not None:
        write_json(file, [asdict(figure) for figure in found])
    return found
