"""Calibration batches: token ids, or keyword arguments of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import collectives

Batch = Tensor | Mapping[str, Tensor]
"""Token ids ``[sequences, t]``, or keyword arguments of the model, including ``input_ids``."""


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch as the model's keyword arguments on ``device``; raise ``InputError`` if it is padded."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise InputError("a calibration batch is padded (attention_mask has zeros): cut whole sequences instead")
    return {name: value.to(device) for name, value in inputs.items()}


def count_sequences(batch: Batch) -> int:
    """Return the number of sequences in a batch."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def count_tokens(batch: Batch) -> int:
    """Return the number of tokens in a batch."""
    return (batch if isinstance(batch, Tensor) else batch["input_ids"]).numel()


def split_batch(batch: Batch, sequences: int) -> list[Batch]:
    """Split a batch into batches of ``sequences`` sequences, or fewer in the last one."""
    if isinstance(batch, Tensor):
        return list(batch.split(sequences))
    parts = {name: value.split(sequences) for name, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def first_sequences(batches: Sequence[Batch], sequences: int | None) -> Sequence[Batch]:
    """Return the first ``sequences`` sequences of the batches (None = all); the last batch may be cut."""
    if sequences is None:
        return batches
    found: list[Batch] = []
    for batch in batches:
        left = sequences - sum(count_sequences(part) for part in found)
        if left <= 0:
            break
        found.append(split_batch(batch, left)[0])
    return found


def own_share(batches: Sequence[Batch]) -> list[Batch]:
    """Return this process's shard of every batch.

    The sequences of all batches are assigned to ranks in turn. A batch of which this rank gets no sequence is empty.
    """
    if collectives.world_size() == 1:
        return list(batches)
    found: list[Batch] = []
    dealt = 0
    for batch in batches:
        mine = slice((collectives.rank() - dealt) % collectives.world_size(), None, collectives.world_size())
        found.append(batch[mine] if isinstance(batch, Tensor) else {name: v[mine] for name, v in batch.items()})
        dealt += count_sequences(batch)
    return found
