"""Packed models on disk: their entry in ``config.json``, and the masks in their weight files.

The weights are safetensors files as transformers writes them. In place of ``NAME.weight``, a packed layer has
``NAME.values``, ``NAME.mask`` and ``NAME.scales`` (``ops/packing.py`` has their layout), and the config's
``quantization_config`` lists the layers::

    {"quant_method": "lit-prune-packed", "version": 1, "tied": {"lm_head": "model.embed_tokens"},
     "layers": {"NAME": {"kind": "int8", "shape": [576, 1536], "stored": 265484, "masked": true, "transposed": false}}}

``stored`` is the length of ``values``; the weight is ``[o, i]``, transposed if the parameter is ``[i, o]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_prune.checkpoint.files import read_json
from lit_prune.checkpoint.folders import inside, weight_files
from lit_prune.errors import InputError, first_line
from lit_prune.ops import PackedMask
from lit_prune.ops.packing import Layout, mask_bits

METHOD = "lit-prune-packed"
"""Name of the entry in a config, as a quantization method of transformers."""
VERSION = 1
"""Version of the format."""
PART = "quantization_config"


def entry_of(layers: Mapping[str, tuple[Layout, bool]], tied: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry of a config.

    Args:
        layers: layouts by name of the layer, and whether the parameter is transposed, ``[i, o]``.
        tied: names of heads, to those of the embeddings that they are tied to.
    """
    described = {
        name: {
            "kind": layout.kind,
            "shape": list(layout.shape),
            "stored": layout.stored,
            "masked": layout.masked,
            "transposed": transposed,
        }
        for name, (layout, transposed) in layers.items()
    }
    return {"quant_method": METHOD, "version": VERSION, "tied": dict(tied), "layers": described}


def is_packed(folder: str | Path) -> bool:
    """Return whether a folder holds a packed model."""
    file = Path(folder).expanduser() / "config.json"
    config = read_json(inside(file.parent, file.name)) if file.is_file() else None
    part = config.get(PART) if isinstance(config, dict) else None
    return isinstance(part, dict) and part.get("quant_method") == METHOD


def read_entry(part: Any) -> tuple[dict[str, Layout], dict[str, str]]:
    """Return the layouts of the packed layers and the ties in an untrusted config's entry.

    Raises:
        InputError: if the entry is damaged, or of another version.
    """
    entry = part if isinstance(part, Mapping) else part.to_dict()
    if entry.get("version") != VERSION:
        raise InputError(
            f"config.json has packed weights of version {entry.get('version')!r}: this lit-prune reads version "
            f"{VERSION}; install another one"
        )
    layers, tied = entry.get("layers"), entry.get("tied")
    names = isinstance(tied, Mapping) and all(isinstance(name, str) for name in tied.values())
    if not isinstance(layers, Mapping) or not isinstance(tied, Mapping) or not names:
        raise InputError(f"config.json has the {PART} {METHOD} without layers, by name, and tied, from name to name")
    return {name: Layout.of(each, name) for name, each in layers.items()}, dict(tied)


def packed_masks(folder: str | Path) -> dict[str, PackedMask]:
    """Return the keep masks of a packed model, by parameter name; layers without a mask are left out.

    Raises:
        InputError: if config and weights do not belong together.
    """
    root = Path(folder).expanduser()
    part = read_json(root / "config.json")[PART]
    layouts, _ = read_entry(part)
    masks: dict[str, Tensor] = {}
    for file in weight_files(root):
        try:
            with safe_open(file, framework="pt") as handle:
                names = [name for name in handle.keys() if name.endswith(".mask")]  # noqa: SIM118 - it has no iterator
                masks |= {name: handle.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise InputError(f"{str(file)!r} is not a safetensors file ({first_line(error)})") from error
    found = {}
    for name, layout in layouts.items():
        if not layout.masked:
            continue
        stored, (shape, dtype) = masks.get(f"{name}.mask"), layout.parts()["mask"]
        if stored is None or tuple(stored.shape) != shape or stored.dtype != dtype:
            raise InputError(f"the packed model {str(folder)!r} has no mask of {name} of the shape {list(shape)}")
        keep = mask_bits(stored)[:, : layout.shape[1]]
        found[f"{name}.weight"] = PackedMask.pack(keep.T if part["layers"][name].get("transposed") else keep)
    return found
