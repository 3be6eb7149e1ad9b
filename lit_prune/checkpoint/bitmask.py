"""Bitmask format of sparse models on disk: the kept weights in sequence, and one bit per weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prune.checkpoint.folders import inside
from lit_prune.errors import InputError, damage
from lit_prune.ops import PackedMask

BITMASK_FILE = "model.bitmask.safetensors"
_FORMAT = "lit-prune bitmask: NAME.kept in the order of the bits of NAME.mask, least significant bit first, row by row"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save_bitmask(path: Path, model: nn.Module, masks: Mapping[str, PackedMask]) -> None:
    """Write a model's parameters and persistent buffers; for parameters with a mask, only the kept weights.

    A tensor with a mask takes ``kept · bytes of the dtype + weights / 8`` bytes. Tied parameters are written once.

    Args:
        path: file to write.
        model: model whose pruned weights are exactly zero.
        masks: keep masks by parameter name.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        owner = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        if tensor.numel() and owner != name:
            tied[name] = owner
        elif name in masks:
            tensors[f"{name}.kept"] = tensor[masks[name].unpack().to(tensor.device)].cpu()
            tensors[f"{name}.mask"] = masks[name].bits.cpu().contiguous()
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor.cpu().contiguous()
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "tied": json.dumps(tied)}
    save_file(tensors, path, metadata=metadata)


def read_bitmask(path: str | Path) -> dict[str, Tensor]:
    """Return every tensor of a bitmask file, or of the folder that contains it, by name, bit for bit as before saving.

    >>> model.load_state_dict(read_bitmask("out/small"))  # doctest: +SKIP

    Raises:
        InputError: if there is no such file, or it has another format.
    """
    with opened(path, BITMASK_FILE, _FORMAT, "a bitmask model is") as (handle, metadata):
        try:
            shapes, tied = json.loads(metadata["shapes"]), json.loads(metadata["tied"])
            parts = {f"{name}.{part}" for name in shapes for part in ("kept", "mask")}
            stored = set(handle.keys())
            _check_names(shapes, tied, parts, stored)
            found = {name: handle.get_tensor(name) for name in sorted(stored - parts)}
            for name, shape in shapes.items():
                found[name] = _unpacked(name, shape, handle)
            return found | {name: found[owner] for name, owner in tied.items()}
        except (InputError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the bitmask model {str(path)!r} is damaged ({damage(error)})") from error


def _check_names(shapes: Mapping[str, Any], tied: Mapping[str, str], parts: set[str], stored: set[str]) -> None:
    """Raise ``InputError`` if a file lacks a tensor, or has two values for one name."""
    for fault, names in (
        ("lacks {}", parts - stored),
        ("holds {} both with a mask and without one", shapes.keys() & stored),
        ("holds {}, which is tied to another tensor", tied.keys() & (stored | shapes.keys())),
        ("lacks {}, to which another tensor is tied", set(tied.values()) - ((stored - parts) | shapes.keys())),
    ):
        if names:
            raise InputError(f"it {fault.format(min(names))}")


def _unpacked(name: str, shape: Sequence[int], handle: Any) -> Tensor:
    """Return a tensor with a mask in its full shape."""
    kept = handle.get_tensor(f"{name}.kept")
    if kept.dtype not in _DTYPES:
        raise InputError(f"it holds {name}.kept as {kept.dtype}: it must be float32, bfloat16, float16 or float64")
    keep = PackedMask(handle.get_tensor(f"{name}.mask"), tuple(shape)).unpack()
    if kept.shape != (int(keep.sum()),):
        raise InputError(f"{name} keeps {int(keep.sum())} weights, and the file has {list(kept.shape)}")
    return kept.new_zeros(shape).masked_scatter_(keep, kept)


@contextmanager
def opened(path: str | Path, name: str, mark: str, what: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file whose ``format`` is ``mark``; yield its handle and its metadata.

    Args:
        path: the file, or a folder that contains it as ``name``.
        name: default name of the file.
        mark: required value of ``format`` in the metadata.
        what: description of the file, for errors.

    Raises:
        InputError: if there is no such file, or it has another format.
    """
    file = Path(path).expanduser()
    file = inside(file, name) if file.is_dir() else file
    asked = f"{what} asked of {str(path)!r}"
    if not file.is_file():
        raise InputError(f"{asked}: there is no such file; name a folder that lit-prune wrote, or its {name}")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != mark:
                raise InputError(f"{asked}: the file holds none")
            yield handle, metadata
    except SafetensorError as error:
        raise InputError(f"{asked}: not a safetensors file ({error})") from error
