"""Selection of the layers to prune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from lit_prune.allocators.base import Layer
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.ops.structured import Unit
from lit_prune.options import as_list
from lit_prune.sharding.parameters import PRUNABLE, read_weight

Patterns = Sequence[str] | str
"""One or several shell patterns over module names."""


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Return shell patterns as a tuple; a single string becomes a tuple of one."""
    return tuple(as_list(patterns))


@dataclass(frozen=True)
class Target:
    """One layer to prune."""

    name: str
    """Dotted module name within the model."""
    module: nn.Module
    block: int
    """Index of the decoder block that contains the layer."""
    unit: Unit | None = None
    """Kind of the units that the layer consists of; see ``Layer.unit``."""
    units: int = 0
    """Number of these units."""
    step: int = 1
    """Number that the number of units kept is a multiple of, if any go."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, ``(o, i)``."""
        outputs, inputs = read_weight(self.module).shape
        return outputs, inputs

    @property
    def parameter(self) -> str:
        """Name of the weight in the model's state dict."""
        return f"{self.name}.weight"


def find_targets(
    model: nn.Module,
    blocks: Sequence[Block],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    owner: str = "plan",
) -> list[Target]:
    """Return the linear layers inside the decoder blocks, in model order.

    Embeddings, norms and ``lm_head`` are outside the blocks or are not linear layers. A weight shared by two modules is
    excluded, because pruning it in one place would change the other.

    Args:
        model: any causal language model.
        blocks: decoder blocks of the model.
        include: shell patterns over full module names; a layer must match one of them.
        exclude: shell patterns over full module names; a layer that matches one of them is excluded.
        owner: name of the option with the patterns, for error messages.

    Raises:
        InputError: if a pattern matches no layer, no layer remains, or a weight is quantised.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    candidates = [
        Target(f"{block.name}.{name}", module, block.index)
        for block in blocks
        for name, module in block.module.named_modules()
        if isinstance(module, PRUNABLE) and uses[id(module.get_parameter("weight"))] == 1
    ]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(target.name, pattern) for target in candidates):
                example = candidates[0].name if candidates else "none"
                raise InputError(
                    f"{owner}.{option}: {pattern!r} matches no linear layer; their names are like {example!r}"
                )
    targets = [t for t in candidates if _matches(t.name, include) and not _matches(t.name, exclude)]
    if not targets:
        raise InputError(f"{owner}.include and {owner}.exclude leave no layer")
    for target in targets:
        if not read_weight(target.module).is_floating_point():
            raise InputError(f"{target.name} is quantised ({read_weight(target.module).dtype}): prune the float model")
    return targets


def find_vectors(model: nn.Module, block: Block, targets: Sequence[Target]) -> dict[str, nn.Parameter]:
    """Return the norms and biases of a block by name within the model, except biases of layers that are not targets.

    A parameter shared with other modules is excluded, because changing it here would change the others.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    pruned = {id(target.module) for target in targets}
    return {
        f"{block.name}.{module_name}.{name}": parameter
        for module_name, module in block.module.named_modules()
        if not isinstance(module, PRUNABLE) or id(module) in pruned
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1 and parameter.is_floating_point() and uses[id(parameter)] == 1
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def as_layer(target: Target, evidence: Any = None, metric: float | None = None) -> Layer:
    """Return the description of a target for an allocator."""
    return Layer(
        target.name,
        target.block,
        target.shape,
        partial(read_weight, target.module),
        evidence,
        metric,
        target.unit,
        target.units,
        target.step,
    )
