"""Time a model as a whole against another one, or the layers of a pruned model in dense and sparse form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from lit_prune.checkpoint.files import write_json
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.outputs import check_file
from lit_prune.checkpoint.packed import is_packed
from lit_prune.commands.output import check_sparse, on_device, refuse_lazy
from lit_prune.errors import InputError
from lit_prune.options import as_list
from lit_prune.reporting.tables import model_speed_table, speed_table
from lit_prune.runtime.model_speed import ModelSpeed, compare_speed, weight_bytes
from lit_prune.runtime.sparse_layers import Speed, measure_speed
from lit_prune.training import LitCausalLM, TextDataModule

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer

_MOST_ROWS = 1_000_000


def speed(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    against: str | None = None,
    tokens: Sequence[int] | int = (1, 16, 256),
    output: str | None = None,
    overwrite: bool = False,
) -> list[Speed] | list[ModelSpeed]:
    """Times a model on this machine: as a whole against another one, or layer by layer in sparse formats.

    Args:
        trainer: Trainer whose device is used.
        model: A model, in the dtype to be used for inference; without ``against``, a folder with masks.
        datamodule: Not used.
        against: Model to compare with as a whole, in generation and on a prompt, such as the dense one; null = time one
            layer of each shape, dense and in torch's sparse formats.
        tokens: Numbers of input rows to time layers with: 1 as in generation, token by token; hundreds as in a prompt.
        output: JSON file to write the timings to; null = none.
        overwrite: Replace the file if it exists.
    """
    refuse_lazy(model, "speed")
    file = None if output is None else check_file(output, ".json", overwrite, [model.pretrained])
    tokens = as_list(tokens)
    if not tokens or not all(1 <= rows <= _MOST_ROWS for rows in tokens):
        raise InputError(f"tokens are {list(tokens)}: give numbers from 1 to {_MOST_ROWS:,}, such as [1, 16, 256]")
    found = _of_layers(trainer, model, tokens) if against is None else _of_models(trainer, model, against)
    if file is not None:
        write_json(file, [asdict(figure) for figure in found])
    return found


def _of_layers(trainer: PruningTrainer, model: LitCausalLM, tokens: Sequence[int]) -> list[Speed]:
    if is_packed(model.pretrained):
        raise InputError(
            f"model.pretrained is {model.pretrained!r}: it is packed; name a model to compare it --against"
        )
    masks = load_masks(model.pretrained)
    model.configure_model()
    check_sparse(model.model, masks, model.pretrained)
    with on_device(trainer, model) as whole:
        found = measure_speed(whole, masks, tokens)
    Console(quiet=trainer.quiet).print(speed_table(found))
    return found


def _of_models(trainer: PruningTrainer, model: LitCausalLM, against: str) -> list[ModelSpeed]:
    model.configure_model()
    dtype = str(next(model.model.parameters()).dtype).rpartition(".")[2]
    other = LitCausalLM(against, dtype=dtype, trust_remote_code=model.trust_remote_code)  # type: ignore[arg-type]
    other.configure_model()
    with on_device(trainer, model) as whole, on_device(trainer, other) as dense:
        found = compare_speed(whole, dense)
        sizes = weight_bytes(dense), weight_bytes(whole)
    Console(quiet=trainer.quiet).print(model_speed_table(found, sizes))
    return found
