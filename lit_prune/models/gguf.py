"""Check the metadata of a GGUF file against its tensors, before a model of those sizes is allocated."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lit_prune.errors import InputError, damage
from lit_prune.internals.gguf import open_gguf
from lit_prune.models.weights import on_meta

_BLOCK = re.compile(r"blk\.(\d+)\.")
_SIZES = (
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_count",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
)
"""Metadata, each of which is at most the largest dimension of a tensor."""


def check_gguf(file: Path, pretrained: str) -> int:
    """Return the number of weights in a GGUF file, from its header; 0 if gguf is not installed, as on loading it.

    Raises:
        InputError: if the file is damaged, or if its metadata describe other blocks or larger matrices than it has.
    """
    if find_spec("gguf") is None:
        return 0  # transformers says how to install it
    asked = f"model.pretrained is {pretrained!r}"
    try:
        header = open_gguf(file)
        architecture = bytes(header.fields["general.architecture"].parts[-1]).decode()
        (count,) = _integers(header.fields[f"{architecture}.block_count"])
        sizes = {
            name: _integers(header.fields[name])
            for name in (f"{architecture}.{size}" for size in _SIZES)
            if name in header.fields
        }
    except Exception as error:  # gguf raises various types
        raise InputError(f"{asked}: it is not a complete GGUF file ({damage(error)}); download it again") from error
    blocks = {int(found[1]) for tensor in header.tensors if (found := _BLOCK.match(tensor.name))}
    if len(blocks) != count or max(blocks, default=-1) != count - 1:
        raise InputError(
            f"{asked}: its {architecture}.block_count is {count:,}, and it has tensors of {len(blocks)} blocks; give a "
            "complete file"
        )
    largest = max((int(size) for tensor in header.tensors for size in tensor.shape), default=0)
    for name, values in sizes.items():
        if max(values, default=0) > largest:
            raise InputError(
                f"{asked}: its {name} is {max(values):,}, and no dimension of its tensors is larger than {largest:,}; "
                "its metadata and its tensors do not belong together"
            )
    return sum(int(tensor.n_elements) for tensor in header.tensors)


def check_described_weights(file: Path, pretrained: str, stored: int) -> None:
    """Raise ``InputError`` if a model of the metadata of a GGUF file has far more weights than are ``stored`` in it."""
    model = on_meta(AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name))
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * stored:  # a file may leave out weights that others repeat
        raise InputError(
            f"model.pretrained is {pretrained!r}: its metadata describe {described:,} weights, and it has {stored:,}; "
            "its metadata and its tensors do not belong together"
        )


def _integers(field: Any) -> list[int]:
    """Return the values of a metadata field, which is a number or an array of numbers."""
    return [int(field.parts[index][0]) for index in field.data]
