"""Erdős-Rényi: sparsities from the shapes of the layers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from lit_prune.allocators.base import Allocator, Layer, check_bounds, check_budget, project_onto_budget
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class ErdosRenyi(Allocator):
    """Density proportional to ``(o + i) / (o i)``: narrow layers keep more of their weights.

    "ER" of Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity", 2018:
    the number of kept weights is proportional to the number of a layer's inputs and outputs. ``dense_last`` is
    "ER-plus" of Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022. Densities that would exceed 1 are
    clipped, and the other layers take the remainder, so that the mean sparsity is exact. It needs no data; use it as a
    baseline.

    .. code-block:: yaml

        allocator: {class_path: ErdosRenyi, init_args: {dense_last: true}}
    """

    dense_last: bool = False
    """Leave the last targeted layer dense; the others take the remainder."""
    min_sparsity: float = 0.0
    """Lowest sparsity of a layer, except the last one with ``dense_last``."""
    max_sparsity: float = 0.99
    """Highest sparsity of a layer."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        check_bounds(self.min_sparsity, self.max_sparsity)

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer by name; see ``Allocator.allocate``."""
        low, high = self.min_sparsity, self.max_sparsity
        check_budget(target, low, high)
        last = 1 if self.dense_last and target else 0
        dense, others = layers[len(layers) - last :], layers[: len(layers) - last]
        sizes = torch.tensor([layer.numel for layer in others], dtype=torch.float64)
        ratios = torch.tensor([sum(layer.shape) / layer.numel for layer in others], dtype=torch.float64)
        goal = target * (1 + sum(layer.numel for layer in dense) / sizes.sum().item()) if others else 1.0
        if goal > high:
            raise InputError(
                f"dense_last leaves {dense[-1].name} dense, so that the other layers cannot carry a sparsity of "
                f"{target:g} below max_sparsity {high:g}: lower the sparsity, or turn dense_last off"
            )
        kept = project_onto_budget(ratios, sizes, 1 - goal, 1 - high, 1 - low)
        found = (1 - kept).clamp(low, high).tolist() + [0.0] * len(dense)
        return {layer.name: sparsity for layer, sparsity in zip(layers, found, strict=True)}
