"""LAMP: one threshold for magnitudes that are relative to the larger weights of their layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lit_prune.allocators.base import Allocator, Layer, check_bounds
from lit_prune.allocators.thresholds import sparsities_at_one_threshold


@final
@dataclass(frozen=True)
class LAMP(Allocator):
    """The fraction of a layer's weights whose LAMP score is below one threshold for all layers.

    Lee et al., "Layer-Adaptive Sparsity for the Magnitude-Based Pruning", 2021. The score of a weight is ``w² / Σ v²``
    over the weights ``v`` of its layer that are at least as large, itself included: the part of the layer's energy that
    would be lost if the weight went next. The largest weight of a layer has a score of 1, so no layer is emptied. Only
    the sparsities are LAMP's; the plan's scorer or solver chooses the weights. It needs no data; use it as a baseline.

    .. code-block:: yaml

        allocator: {class_path: LAMP, init_args: {max_sparsity: 0.95}}
    """

    min_sparsity: float = 0.0
    """Lowest sparsity of a layer."""
    max_sparsity: float = 0.99
    """Highest sparsity of a layer."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        check_bounds(self.min_sparsity, self.max_sparsity)

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer by name; see ``Allocator.allocate``."""
        return sparsities_at_one_threshold(layers, lamp_scores, target, self.min_sparsity, self.max_sparsity)


def lamp_scores(magnitudes: Tensor) -> Tensor:
    """Return the ascending LAMP scores ``[n]`` (float64) of ascending magnitudes ``[n]``; those of zeros are 0."""
    energies = magnitudes.double().square()
    rest = energies.flip(0).cumsum(0).flip(0)  # the energy of each weight and of all larger ones
    return energies / rest.clamp(min=torch.finfo(rest.dtype).tiny)  # a layer of zeros has no energy
