"""OWL: lower sparsity for blocks with more outlying activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from lit_prune.allocators.base import Allocator, Layer, Trial, check_bounds, meet_budget
from lit_prune.errors import InputError
from lit_prune.ops import LayerStats, Pattern
from lit_prune.ops.precision import working


@final
@dataclass(frozen=True)
class OWL(Allocator):
    """``s = target - (2λ (D - D_min) / (D_max - D_min) - mean)``: lower sparsity for blocks with more outliers.

    Yin et al., "Outlier Weighed Layerwise Sparsity", 2023. ``D`` is the fraction of a dense block's Wanda scores
    ``|W| * ||X||`` that exceed ``threshold`` times their mean over the block. The mean sparsity is made exact
    afterwards.

    .. code-block:: yaml

        allocator: {class_path: OWL, init_args: {spread: 0.08, threshold: 5}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_sq_norm"})

    spread: float = 0.08
    """λ of the paper: sparsities span ``2λ`` around the target."""
    threshold: float = 5.0
    """M of the paper: scores above this multiple of the mean are outliers."""
    min_sparsity: float = 0.0
    """Lowest sparsity of a layer."""
    max_sparsity: float = 0.99
    """Highest sparsity of a layer."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not 0 <= self.spread < 0.5:
            raise InputError(f"spread is {self.spread!r}: it must be in [0, 0.5), such as 0.08")
        if not 0 < self.threshold < float("inf"):
            raise InputError(f"threshold is {self.threshold!r}: it must be a positive number, such as 5")
        check_bounds(self.min_sparsity, self.max_sparsity)

    def observe(
        self,
        layers: Sequence[Layer],
        stats: Sequence[LayerStats],
        pattern: Pattern,
        output_error: Callable[[Pattern], Trial],
    ) -> float:
        """Return the block's fraction of outliers; ``stats`` must contain ``input_sq_norm`` ``[i]``."""
        scores = torch.cat(
            [
                (working(layer.read()).abs() * layer_stats.input_sq_norm.sqrt()).flatten()
                for layer, layer_stats in zip(layers, stats, strict=True)
            ]
        )
        return (scores > self.threshold * scores.mean()).double().mean().item()

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer by name; see ``Allocator.allocate``."""
        if any(layer.evidence is None for layer in layers):
            raise InputError("OWL got no outlier ratios: it must observe every block of the dense model first")
        outliers = torch.tensor([layer.evidence for layer in layers], dtype=torch.float64)
        span = outliers.max() - outliers.min()
        shift = 2 * self.spread * (outliers - outliers.min()) / span if span > 0 else torch.zeros_like(outliers)
        ratios = (target - (shift - shift.mean())).clamp_min(0.0)
        proposed = {layer.name: ratio for layer, ratio in zip(layers, ratios.tolist(), strict=True)}
        return meet_budget(layers, proposed, target, self.min_sparsity, self.max_sparsity)
