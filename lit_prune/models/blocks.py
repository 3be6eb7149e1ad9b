"""The decoder blocks of a causal language model, in order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from lit_prune.errors import InputError
from lit_prune.sharding.parameters import PRUNABLE, full_shape


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    index: int
    name: str
    """Dotted module name within the model, such as ``model.layers.0``."""
    module: nn.Module


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the decoder blocks in order, identified by the model's structure rather than by a list of names.

    The blocks are the items of the outermost ``ModuleList`` with the most weights in linear layers.

    Raises:
        InputError: if no ``ModuleList`` contains a linear layer.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)
    ]
    name, blocks = max(outermost, key=lambda item: _linear_weights(item[1]), default=("", nn.ModuleList()))
    if not _linear_weights(blocks):
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers: nothing to prune (if it "
            "is packed, lit-prune export --to hf makes it dense)"
        )
    return [Block(index, f"{name}.{index}", module) for index, module in enumerate(blocks)]


def _linear_weights(module: nn.Module) -> int:
    weights = [m.get_parameter("weight") for m in module.modules() if isinstance(m, PRUNABLE)]
    return sum(prod(full_shape(weight)) for weight in weights)
