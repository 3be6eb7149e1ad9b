"""The contract of an allocator, and the projection onto the sparsity budget that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import LayerStats, Pattern
from lit_prune.ops.masks import check_sparsity


@dataclass(frozen=True)
class Layer:
    """What an allocator may know of one layer."""

    name: str
    """Dotted module name in the model."""
    block: int
    """Index of the decoder block that holds it."""
    shape: tuple[int, int]
    """``(o, i)``."""
    read: Callable[[], Tensor]
    """Returns the dense weight ``[o, i]``."""
    evidence: Any = None
    """What the allocator's ``observe`` returned for the layer's block."""
    metric: float | None = None
    """What the allocator's ``measure`` returned for the layer, where somebody has asked it before."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class Allocator(ABC):
    """How much of each layer goes?"""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the dense model to collect first, of ``input_sq_norm``, ``gram``, ``output_error``."""
        return frozenset()

    @property
    def observed_sequences(self) -> int | None:
        """How many calibration sequences, the first ones, ``observe`` is told about; None = all."""
        return None

    def observe(
        self,
        layers: Sequence[Layer],
        stats: Sequence[LayerStats],
        pattern: Pattern,
        output_error: Callable[[Pattern], float],
    ) -> Any:
        """Return what ``allocate`` must know of a dense block; called block by block where ``needs`` names anything.

        Args:
            layers: the block's layers.
            stats: of their inputs, in the same order.
            pattern: what all layers together are to get; its sparsity is the target.
            output_error: prunes the block's layers to a pattern for a moment and returns the relative error of its
                output; for allocators whose ``needs`` names it.
        """
        return None

    @property
    def metric_name(self) -> str | None:
        """Name of the number that ``measure`` reads off a weight, with all that determines it; None = it reads nothing.

        Numbers of one name are interchangeable: the engine keeps them under it for other runs with the same weights.
        """
        return None

    def measure(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return what ``allocate`` must know of each layer's weight alone, by name; see ``Layer.metric``."""
        return {}

    @abstractmethod
    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer, by name.

        The mean, weighted by the number of weights, is exactly ``target``, and every value lies within the allocator's
        bounds.

        Args:
            layers: what is to be pruned.
            target: fraction of all their weights to remove, in [0, 1).

        Raises:
            InputError: if no allocation within the bounds has that mean.
        """


def check_bounds(min_sparsity: float, max_sparsity: float) -> None:
    """Raise ``InputError`` if the bounds of an allocator are not a range within [0, 1)."""
    check_sparsity(min_sparsity, "min_sparsity")
    check_sparsity(max_sparsity, "max_sparsity")
    if min_sparsity > max_sparsity:
        raise InputError(f"min_sparsity {min_sparsity:g} is above max_sparsity {max_sparsity:g}")


def check_budget(target: float, low: float, high: float) -> None:
    """Raise ``InputError`` if no values in ``[low, high]`` have the mean ``target``."""
    if not low <= target <= high:
        raise InputError(f"no allocation with values in [{low:g}, {high:g}] has the mean {target:g}")


def meet_budget(
    layers: Sequence[Layer], proposed: Mapping[str, float], target: float, low: float, high: float
) -> dict[str, float]:
    """Return the proposed sparsities, by layer name, projected onto the budget (see ``project_onto_budget``)."""
    ratios = torch.tensor([proposed[layer.name] for layer in layers], dtype=torch.float64)
    sizes = torch.tensor([layer.numel for layer in layers], dtype=torch.float64)
    exact = project_onto_budget(ratios, sizes, target, low, high)
    return {layer.name: value for layer, value in zip(layers, exact.tolist(), strict=True)}


def project_onto_budget(ratios: Tensor, sizes: Tensor, target: float, low: float, high: float) -> Tensor:
    """Scale ``ratios`` to the budget; clip what leaves ``[low, high]`` and re-spread the rest until the mean is exact.

    The result is ``clip(eta * ratios, low, high)`` with the one ``eta`` that meets the budget. Its weighted mean never
    falls as ``eta`` grows, and is linear between the points where a layer meets a bound, so the exact ``eta`` lies on
    the piece that straddles the target. Worked: ratios (1, 2), equal sizes, target 0.6, high 0.7: unclipped that is
    (0.4, 0.8); 0.8 is clipped to 0.7 and the other takes what is left, 0.5.

    Args:
        ratios: ``[layers]`` >= 0, the proposed sparsities, up to a common factor.
        sizes: ``[layers]``, numbers of weights.
        target: the weighted mean to reach.
        low: no value is below it.
        high: no value is above it.

    Raises:
        InputError: if the target is outside ``[low, high]``, or a ratio is negative or not finite.
    """
    check_budget(target, low, high)
    if not (ratios.isfinite().all() and (ratios >= 0).all()):
        raise InputError(f"sparsities must be finite and >= 0, got {ratios.min().item():g} to {ratios.max().item():g}")
    shares = sizes / sizes.sum()
    positive = ratios > 0
    # Layers at ratio 0 stay at `low`, so the others may be unable to carry the budget on their own.
    if shares[positive].sum() * high + shares[~positive].sum() * low < target - 1e-12:
        raise InputError(f"the layers with a sparsity above 0 cannot carry the budget of {target:g} below {high:g}")
    if not positive.any():
        return torch.full_like(ratios, target)

    def mean_at(eta: Tensor) -> Tensor:
        return (shares * (eta * ratios).clamp(low, high)).sum()

    kinks = torch.cat([low / ratios[positive], high / ratios[positive]]).sort().values
    means = torch.stack([mean_at(eta) for eta in kinks])
    upper = int(torch.searchsorted(means, torch.tensor(target, dtype=means.dtype)).clamp(max=len(kinks) - 1))
    lower = max(upper - 1, 0)
    rise = means[upper] - means[lower]
    step = (target - means[lower]) / rise if rise > 0 else torch.ones_like(rise)
    eta = kinks[lower] + step * (kinks[upper] - kinks[lower])
    return (eta * ratios).clamp(low, high)


def in_whole_levels(
    layers: Sequence[Layer],
    sparsity: Mapping[str, float],
    target: float,
    levels: int,
    least: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Round sparsities to multiples of ``1 / levels``, as N:M needs, meeting the budget as nearly as that allows.

    Every layer is rounded down, and those that lost most are rounded up while that brings the total nearer the target.
    None gets to 1. Worked: 0.3 and 0.45 at equal sizes in fourths are 0.25 and 0.25, and the second, which lost more,
    goes up to 0.5: a mean of 0.375 like that of the two.

    Args:
        layers: the layers.
        sparsity: what is rounded, by layer name.
        target: the weighted mean to meet.
        levels: M of N:M.
        least: sparsities that no layer may fall below, such as those that an earlier pruning has reached; where that
            takes more than the target, other layers get less. None = no bounds.
    """
    lowest = {layer.name: round((least or {}).get(layer.name, 0.0) * levels) for layer in layers}
    found = {
        layer.name: max(min(int(sparsity[layer.name] * levels + 1e-9), levels - 1), lowest[layer.name])
        for layer in layers
    }
    missing = sum(layer.numel * (target - found[layer.name] / levels) for layer in layers)
    by_loss = sorted(layers, key=lambda layer: found[layer.name] - sparsity[layer.name] * levels)
    for direction, order in ((1, by_loss), (-1, by_loss[::-1])):
        for layer in order:
            step, level = layer.numel / levels, found[layer.name] + direction
            if direction * missing >= step / 2 and lowest[layer.name] <= level < levels:
                found[layer.name] = level
                missing -= direction * step
    return {name: level / levels for name, level in found.items()}
