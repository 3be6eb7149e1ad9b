"""Write a pruned model or an analysis atomically as one folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
)

from lit_prune.checkpoint.bitmask import BITMASK_FILE, save_bitmask
from lit_prune.checkpoint.configs import save_configs
from lit_prune.checkpoint.files import replacing_folder
from lit_prune.checkpoint.masks import MASKS_FILE, REPORT_FILE, check_masks_hold, save_masks
from lit_prune.checkpoint.outputs import ANALYSIS, check_output, check_space, find_other
from lit_prune.errors import InputError
from lit_prune.models.experts import apart, together
from lit_prune.ops import PackedMask
from lit_prune.runtime.packed_model import Bits, HeadBits, pack_model
from lit_prune.sharding.offload import disk_store_of, save_lazily

Format = Literal["hf", "hf-sharded", "bitmask", "packed"]
"""Format of the weights: as saved by transformers, in files of limited size, or the kept weights and one bit per
weight, lossless (bitmask) or to compute with (packed)."""


def save_pruned(
    folder: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    masks: Mapping[str, PackedMask],
    documents: Mapping[str, str | bytes],
    overwrite: bool = False,
    to: Format = "hf",
    shard_size: str = "1GB",
    bits: Bits = 16,
    head_bits: HeadBits | None = None,
) -> Path:
    """Write a model, its masks and ``documents`` (file name to content) atomically as one folder.

    Args:
        folder: Output folder.
        model: Model whose pruned weights are exactly zero.
        tokenizer: Tokenizer of the model; None = none.
        masks: Keep masks by parameter name; empty for a model that became smaller.
        documents: Contents of additional files, by name.
        overwrite: Replace the folder if it exists.
        to: Format of the weights.
        shard_size: Maximum file size for ``hf-sharded``.
        bits: Bits per kept weight for ``packed``, which converts the model in place.
        head_bits: Bits per weight of embedding and head for ``packed``; None = 16 for 16 bits, else 8.

    Raises:
        InputError: if the folder exists and ``overwrite`` is off, or the disk lacks space.
        RuntimeError: if a weight that its mask prunes is not exactly zero.
    """
    if to in ("bitmask", "packed") and disk_store_of(model):
        raise InputError(f"to is {to!r}: a model that was opened lazily is written as hf-sharded, a file per block")
    with apart(model):
        check_masks_hold(model, masks)
    path = check_output(folder, overwrite)
    check_space(path, model)
    if to == "packed":
        pack_model(model, masks, bits, head_bits)
    with replacing_folder(path, find_other) as temporary:
        _write_model(temporary, model, masks, to, shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        # A model that became smaller has a report alone, and a packed one has the masks in its weights.
        if to != "packed" and (masks or REPORT_FILE not in documents):
            save_masks(temporary / MASKS_FILE, masks)
        _write_documents(temporary, documents)
    return path


def _write_model(folder: Path, model: Any, masks: Mapping[str, PackedMask], to: Format, shard_size: str) -> None:
    if disk := disk_store_of(model):
        save_lazily(folder, model, disk)
    elif to != "bitmask":
        with together(model):
            model.save_pretrained(folder, **({"max_shard_size": shard_size} if to == "hf-sharded" else {}))
    else:
        save_configs(folder, model)
        with apart(model):
            save_bitmask(folder / BITMASK_FILE, model, masks)


def save_documents(folder: str | Path, documents: Mapping[str, str | bytes], overwrite: bool = False) -> Path:
    """Write an analysis (file name to content) atomically as one folder; replace an older one only if ``overwrite``."""
    path = check_output(folder, overwrite, ANALYSIS)
    with replacing_folder(path, partial(find_other, kind=ANALYSIS)) as temporary:
        _write_documents(temporary, documents)
    return path


def _write_documents(folder: Path, documents: Mapping[str, str | bytes]) -> None:
    for name, content in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        # A quoted file name may contain bytes that are not valid text.
        (folder / name).write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def check_shard_size(size: str) -> None:
    """Raise ``InputError`` if ``size`` is not a positive number of bytes with a unit, such as 500MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", size.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InputError(f"shard_size is {size!r}: give a positive number and KB, MB, GB or TB, such as 500MB")
