"""One threshold for the scores of all layers: the allocation of global magnitude pruning and LAMP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_prune.allocators.base import Layer, check_budget
from lit_prune.errors import NumericalError

_POINTS = 1 << 14
"""Maximum number of scores of a layer that are kept; a larger layer is described by that many quantiles."""


def quantiles(scores: Tensor) -> Tensor:
    """Return ascending scores ``[n]``, or 16,384 evenly spaced ones of them if there are more.

    The k-th of n values is the score that a fraction of k / n of the weights does not exceed.
    """
    if len(scores) <= _POINTS:
        return scores
    return scores[torch.arange(1, _POINTS + 1) * len(scores) // _POINTS - 1]


def sparsities_at_one_threshold(
    layers: Sequence[Layer], score: Callable[[Tensor], Tensor], target: float, low: float, high: float
) -> dict[str, float]:
    """Return the fraction of each layer's scores that one threshold for all layers removes, by layer name.

    Fractions are clipped to ``[low, high]``. The threshold is the one whose clipped fractions have the mean ``target``;
    between the two neighbouring scores that straddle it, the fractions are interpolated, so that the mean is exact also
    if scores are equal.

    Args:
        layers: layers to prune.
        score: function that returns the ascending scores ``[n]`` of a layer's ascending magnitudes ``[n]`` (float32).
        target: fraction of all weights to remove.
        low: lowest sparsity of a layer.
        high: highest sparsity of a layer.

    Raises:
        NumericalError: if a weight holds NaN or Inf.
    """
    check_budget(target, low, high)
    scores = [quantiles(score(_magnitudes(layer))) for layer in layers]  # one layer in memory at a time
    sizes = torch.tensor([layer.numel for layer in layers], dtype=torch.float64)
    shares = sizes / sizes.sum()
    thresholds = torch.cat(scores).unique()

    def removed(position: int) -> Tensor:
        """Return the clipped fraction of each layer at a threshold; -1 is the position below the lowest score."""
        if position < 0:
            return torch.full_like(shares, low)
        threshold = thresholds[position]
        found = [torch.searchsorted(values, threshold, right=True).item() / len(values) for values in scores]
        return torch.tensor(found, dtype=torch.float64).clamp(low, high)

    below, above = -1, len(thresholds) - 1  # the mean is at most the target below, and at least the target above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if (shares * removed(middle)).sum() <= target else (below, middle)
    first, second = removed(below), removed(above)
    rise = (shares * (second - first)).sum()
    step = (target - (shares * first).sum()) / rise if rise > 0 else rise
    between = (first + step * (second - first)).clamp(low, high)
    return {layer.name: value for layer, value in zip(layers, between.tolist(), strict=True)}


def _magnitudes(layer: Layer) -> Tensor:
    magnitudes = layer.read().detach().flatten().cpu().float().abs().sort().values
    if not magnitudes[-1].isfinite():  # NaN is sorted behind Inf
        raise NumericalError(f"{layer.name}: the weight holds NaN or Inf")
    return magnitudes
