"""Global magnitude: one threshold of the weights' magnitude for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lit_prune.allocators.base import Allocator, Layer, check_bounds
from lit_prune.allocators.thresholds import sparsities_at_one_threshold


@final
@dataclass(frozen=True)
class GlobalMagnitude(Allocator):
    """The fraction of a layer's weights whose magnitude is below one threshold for all layers.

    Layers of small weights lose more. With ``Magnitude`` and groups of whole matrices, this is global magnitude pruning
    (Han et al., "Learning both Weights and Connections", 2015); with another scorer or solver, only the sparsities are
    those of global magnitude pruning. It needs no data; use it as a baseline.

    .. code-block:: yaml

        allocator: {class_path: GlobalMagnitude, init_args: {max_sparsity: 0.95}}
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
        return sparsities_at_one_threshold(layers, _magnitude, target, self.min_sparsity, self.max_sparsity)


def _magnitude(magnitudes: Tensor) -> Tensor:
    return magnitudes
