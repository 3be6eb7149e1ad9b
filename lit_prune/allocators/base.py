"""Interface of an allocator, and the projection onto the sparsity budget shared by all allocators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import LayerStats, Pattern, Structured
from lit_prune.ops.masks import check_sparsity
from lit_prune.ops.structured import Unit


@dataclass(frozen=True)
class Layer:
    """Description of one layer for an allocator."""

    name: str
    """Dotted module name within the model."""
    block: int
    """Index of the decoder block that contains the layer."""
    shape: tuple[int, int]
    """Shape of the weight, ``(o, i)``."""
    read: Callable[[], Tensor]
    """Function that returns the dense weight ``[o, i]``."""
    evidence: Any = None
    """Observation of the layer's block, as returned by the allocator's ``observe``."""
    metric: float | None = None
    """Metric of the layer, as returned by the allocator's ``measure``; None if it has not been measured yet."""
    unit: Unit | None = None
    """Kind of the units that the layer consists of, ``channels`` or ``heads``; None unless the pattern is structured,
    or if the layer can only be removed with its block."""
    units: int = 0
    """Number of these units."""
    step: int = 1
    """Number that the number of units kept is a multiple of, if any go."""

    @property
    def numel(self) -> int:
        """Number of weights in the layer."""
        return self.shape[0] * self.shape[1]


class Trial(NamedTuple):
    """Result of pruning a dense block on trial."""

    error: float
    """Relative error of the block's output, ``mean_t ||B'(h)_t - B(h)_t||² / ||B(h)_t||²`` over calibration tokens."""
    removed: int
    """Number of weights that were removed from the block's layers."""
    seconds: float = 0.0
    """Seconds by which the block got faster; 0 unless the allocator's ``needs`` contains ``seconds``."""


class Allocator(ABC):
    """Base class of allocators, which assign a sparsity to every layer."""

    @property
    def needs(self) -> frozenset[str]:
        """What to learn of the dense model first: any of ``input_sq_norm``, ``gram``, ``output_error``, ``seconds``."""
        return frozenset()

    @property
    def observed_sequences(self) -> int | None:
        """Number of calibration sequences, counted from the first, on which ``observe`` is called; None = all."""
        return None

    def check(self, pattern: Pattern) -> None:
        """Raise ``InputError`` if the allocator has no use for a plan's pattern."""
        if isinstance(pattern, Structured) and "blocks" in pattern.units and len(pattern.units) > 1:
            raise InputError(
                f"plan.pattern.units is {list(pattern.units)}, and plan.allocator is {type(self).__name__}: only "
                "Measured weighs blocks against other units; use it, or prune a second time for the other units"
            )

    def observe(
        self,
        layers: Sequence[Layer],
        stats: Sequence[LayerStats],
        pattern: Pattern,
        output_error: Callable[[Pattern], Trial],
    ) -> Any:
        """Return the observations of a dense block for ``allocate``; called block by block if ``needs`` is not empty.

        Args:
            layers: layers of the block.
            stats: statistics of the layers' inputs, in the same order.
            pattern: pattern of the plan; its sparsity is the overall target.
            output_error: function that temporarily prunes the block's layers to a pattern; available to allocators
                whose ``needs`` contains ``output_error``. A structured pattern of one kind of units (``only``) removes
                these, and one of ``blocks`` all linear layers of the block.
        """
        return None

    @property
    def metric_name(self) -> str | None:
        """Name of the metric that ``measure`` returns, with every parameter that determines it; None = no metric.

        Metrics of the same name are interchangeable: the engine caches them by name for other runs with the same
        weights.
        """
        return None

    def measure(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return the metric of each layer's weight for ``allocate``, by layer name; see ``Layer.metric``."""
        return {}

    @abstractmethod
    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer, by name.

        The mean, weighted by the number of weights, is exactly ``target``, and every value is within the allocator's
        bounds.

        Args:
            layers: layers to prune.
            target: fraction of all their weights to remove, in [0, 1).

        Raises:
            InputError: if no allocation within the bounds has that mean.
        """


def check_bounds(min_sparsity: float, max_sparsity: float) -> None:
    """Raise ``InputError`` if the bounds of an allocator are not a valid range within [0, 1)."""
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
    """Scale ``ratios`` to the budget; clip to ``[low, high]`` and redistribute the rest until the mean is exact.

    The result is ``clip(eta * ratios, low, high)`` with the unique ``eta`` that meets the budget. Its weighted mean is
    non-decreasing in ``eta``, and linear between the points at which a layer reaches a bound, so the exact ``eta`` is
    on the segment that straddles the target. Example: ratios (1, 2), equal sizes, target 0.6, high 0.7: unclipped, the
    sparsities are (0.4, 0.8); 0.8 is clipped to 0.7 and the other layer takes the remainder, 0.5.

    Args:
        ratios: ``[layers]`` >= 0, proposed sparsities, up to a common factor.
        sizes: ``[layers]``, numbers of weights.
        target: weighted mean to reach.
        low: lower bound of every sparsity.
        high: upper bound of every sparsity.

    Raises:
        InputError: if the target is outside ``[low, high]``, or a ratio is negative or not finite.
    """
    check_budget(target, low, high)
    if not (ratios.isfinite().all() and (ratios >= 0).all()):
        raise InputError(f"sparsities must be finite and >= 0, got {ratios.min().item():g} to {ratios.max().item():g}")
    shares = sizes / sizes.sum()
    positive = ratios > 0
    # Layers with ratio 0 stay at `low`, so the others alone may be unable to meet the budget.
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
    """Round sparsities to multiples of ``1 / levels``, as N:M requires, as close to the budget as possible.

    Every layer is rounded down; then the layers with the largest rounding loss are rounded up while that brings the
    mean closer to the target. No layer reaches 1. Example: 0.3 and 0.45 at equal sizes in fourths are rounded down to
    0.25 and 0.25, and the second, with the larger loss, is rounded up to 0.5: the mean of 0.375 is unchanged.

    Args:
        layers: layers to prune.
        sparsity: sparsities to round, by layer name.
        target: weighted mean to meet.
        levels: M of N:M.
        least: lower bound of each layer's sparsity, by layer name, such as the sparsities that an earlier pruning
            reached; if a bound exceeds a layer's own value, other layers get less. None = no bounds.
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
