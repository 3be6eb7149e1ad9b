"""Keep masks on disk, and the check that a model satisfies them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from lit_prune.checkpoint.bitmask import opened
from lit_prune.checkpoint.files import save_tensors_in_order
from lit_prune.checkpoint.packed import is_packed, packed_masks
from lit_prune.errors import InputError, first_line
from lit_prune.models.blocks import find_blocks
from lit_prune.ops import PackedMask
from lit_prune.ops.masks import keep_only
from lit_prune.sharding.block_store import store_of

MASKS_FILE, REPORT_FILE = "masks.safetensors", "pruning.json"
_FORMAT = "lit-prune keep masks, one bit per weight, least significant bit first, row by row"


def save_masks(path: Path, masks: Mapping[str, PackedMask]) -> None:
    """Write keep masks by parameter name, as uint8 bits with the shapes in the metadata."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    bits = {name: mask.bits.cpu().contiguous() for name, mask in masks.items()}
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes)}
    save_tensors_in_order(path, bits, metadata)


def load_masks(path: str | Path) -> dict[str, PackedMask]:
    """Read keep masks by parameter name, from a ``masks.safetensors`` file or the pruned folder that contains it."""
    with opened(path, MASKS_FILE, _FORMAT, "masks are") as (handle, metadata):
        try:
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            if others := set(handle.keys()) - shapes.keys():
                raise InputError(f"{min(others)} has no shape")
            return {name: PackedMask(handle.get_tensor(name), shape) for name, shape in shapes.items()}
        except (InputError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise InputError(f"the masks of {str(path)!r} are damaged ({first_line(error)})") from error


def masks_of(folder: str | Path) -> dict[str, PackedMask]:
    """Read the keep masks of a pruned folder, packed or not; a model that became smaller has a report and no masks."""
    path = Path(folder).expanduser()
    if is_packed(path):
        return packed_masks(path)
    smaller = (path / REPORT_FILE).is_file() and not (path / MASKS_FILE).exists()
    return {} if smaller else load_masks(folder)


def check_masks_hold(model: nn.Module, masks: Mapping[str, PackedMask]) -> None:
    """Raise a ``RuntimeError`` that names the first parameter with a pruned weight that is not exactly zero.

    Raises ``InputError`` if the model lacks a parameter with a mask, or if its shape differs.
    """
    store, parameters = store_of(model), dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or tuple(parameters[name].shape) != mask.shape:
            raise InputError(f"the masks are of another model: it has no {name} of the shape {list(mask.shape)}")
    for block in find_blocks(model):
        with store.resident(block):
            for name, parameter in block.module.named_parameters(prefix=block.name):
                if name in masks:
                    _check_mask_holds(name, parameter.detach(), masks[name])


def _check_mask_holds(name: str, parameter: Tensor, mask: PackedMask) -> None:
    revived = int(keep_only(parameter, ~mask.unpack().to(parameter.device)).count_nonzero())
    if revived:
        raise RuntimeError(
            f"{name}: {revived} pruned weights are not zero, so this model is not as sparse as its masks"
        )
