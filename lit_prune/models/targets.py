"""Which weights to prune."""

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
from lit_prune.options import as_list
from lit_prune.sharding.parameters import PRUNABLE, read_weight

Patterns = Sequence[str] | str
"""Shell patterns over module names, or one of them."""


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Return shell patterns as a tuple; one that stands alone counts as a list of one."""
    return tuple(as_list(patterns))


@dataclass(frozen=True)
class Target:
    """One layer to prune."""

    name: str
    """Dotted module name in the model."""
    module: nn.Module
    block: int
    """Index of the decoder block that holds it."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(o, i)``."""
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
    """Return the linear layers inside the decoder blocks, in the order of the model.

    Embeddings, norms and ``lm_head`` lie outside the blocks or are no linear layers; a weight that two modules share is
    left alone, because pruning it in one place would change the other.

    Args:
        model: any causal language model.
        blocks: its decoder blocks.
        include: shell patterns over full module names; a layer must match one of them.
        exclude: shell patterns; a layer that matches one is left alone.
        owner: of the patterns, as an error names them.

    Raises:
        InputError: if a pattern matches no layer, nothing is left, or a weight is quantised.
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
    """Return the norms and biases of a block by name in the model, but for those of layers that are not targets.

    One that other modules share is not among them: changing it here would change the others.
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
    """Return what an allocator may know of a target."""
    return Layer(target.name, target.block, target.shape, partial(read_weight, target.module), evidence, metric)
