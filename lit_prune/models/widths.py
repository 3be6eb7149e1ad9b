"""Layers of other widths than in a model's config, as they are after structured pruning with uneven widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.sharding.parameters import PRUNABLE, to_parameter_layout

METHOD = "lit-prune-widths"
"""Name of the entry in a config, as a quantization method of transformers, which is its way to load other layers."""
_PART = "quantization_config"


def widths_of(config: Any) -> dict[str, Any]:
    """Return the shapes ``[o, i]`` of a config's layers with other widths, by name; empty if there are none.

    Raises:
        InputError: if the entry of an untrusted config is not of this form.
    """
    entry = getattr(config, _PART, None) or {}
    entry = entry if isinstance(entry, Mapping) else entry.to_dict()
    if entry.get("quant_method") != METHOD:
        return {}
    shapes = entry.get("shapes")
    if not isinstance(shapes, Mapping) or not all(map(_is_shape, shapes.values())):
        raise InputError(f"config.json has the {_PART} {METHOD} without shapes, from names of layers to two sizes each")
    return dict(shapes)


def set_widths(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Store the shapes ``[o, i]`` of layers in a config."""
    setattr(config, _PART, {"quant_method": METHOD, "shapes": {name: list(shape) for name, shape in shapes.items()}})


@torch.no_grad()
def narrow(model: nn.Module, shapes: Mapping[str, Any]) -> None:
    """Replace the weights of linear layers by uninitialised ones of given shapes ``[o, i]``, in place.

    Raises:
        InputError: if the model has no such layer, or it is narrower.
    """
    for name, (outputs, inputs) in shapes.items():
        layer: Any = dict(model.named_modules()).get(name)
        if not isinstance(layer, PRUNABLE):
            raise InputError(f"config.json gives {name!r} the shape {[outputs, inputs]}, which is not a linear layer")
        before = to_parameter_layout(layer, layer.weight)
        if not (outputs <= before.shape[0] and inputs <= before.shape[1]):
            raise InputError(
                f"config.json gives {name!r} the shape {[outputs, inputs]}, which is larger than its own, "
                f"{list(before.shape)}"
            )
        layer.weight = nn.Parameter(to_parameter_layout(layer, before[:outputs, :inputs]).contiguous())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[:outputs].clone())
        if isinstance(layer, nn.Linear):
            layer.in_features, layer.out_features = inputs, outputs
        else:
            layer.nx, layer.nf = inputs, outputs


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size >= 1 for size in value)
