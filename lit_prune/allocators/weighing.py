"""Choice between units of several kinds at equal cost: heads against channels against whole blocks."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.allocators.base import Layer
from lit_prune.errors import InputError
from lit_prune.ops.structured import Unit

_HIGHEST = 2.0**60
"""Price at which everything goes that can, if the errors and the savings are at most of this ratio."""
_BISECTIONS = 120
"""Number of bisections of the price, from the highest to one where errors no longer differ."""


@dataclass(frozen=True)
class Curve:
    """Output error of a block by how much of one kind of units is removed."""

    unit: Unit
    cost: Tensor
    """What removing units saves, ``[levels]`` float64, ascending from 0: weights, or seconds."""
    errors: Tensor
    """Output errors, ``[levels]`` float64, ascending from 0."""


@dataclass(frozen=True)
class Choices:
    """What can be removed of one block."""

    curves: tuple[Curve, ...]
    """A curve for each kind of units."""
    cost: float = 0.0
    """What removing the whole block saves."""
    error: float = float("inf")
    """Output error without the block; infinite if it must stay."""


Chosen = list[int] | None
"""Level of each curve of a block; None = the whole block is removed."""


def weigh(blocks: Sequence[Choices], budget: float) -> list[Chosen]:
    """Return the choices of all blocks that minimise the sum of the errors, and together save the ``budget``.

    At one price for all, each block takes the levels that minimise its error minus the price times what they save, or
    is removed as a whole if that is lower still. The price is raised until the savings reach the budget; because they
    jump, single levels then fill up the rest, the cheapest per saving first.

    Example: two blocks with one curve each, savings 0, 1, 2 in both, errors 0, 1, 3 and 0, 3, 7, and a budget of 3. The
    levels of the first cost 1 and 2 for each unit saved, those of the second 3 and 4, so that both of the first go and
    one of the second: the sum of the errors is 3 + 3 = 6, and 1 + 7 = 8 the other way round.

    Returns:
        Choices in the order of ``blocks``. Their savings differ from the budget by at most half of the smallest level,
        as long as one of its kind can still be added or taken away.

    Raises:
        InputError: if the blocks together cannot save the budget.
    """
    most = sum(max(block.cost if block.error < float("inf") else 0.0, _most(block)) for block in blocks)
    if most < budget * (1 - 1e-9):
        raise InputError(
            f"at most {most / budget:.0%} of what should be removed can be: lower plan.pattern.sparsity, or raise "
            "plan.allocator.spread"
        )
    low, high = 0.0, 1.0
    below = above = [_cheapest(block, low) for block in blocks]
    while saved(blocks, above) < budget and high < _HIGHEST:
        high *= 2
        above = [_cheapest(block, high) for block in blocks]
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        chosen = [_cheapest(block, price) for block in blocks]
        if saved(blocks, chosen) <= budget:
            low, below = price, chosen
        else:
            high, above = price, chosen
    unit = min(_smallest(block) for block in blocks)
    tried = [_filled_up(blocks, start, budget, unit) for start in _between(below, above)]
    if all(
        saved(blocks, chosen) < budget - unit / 2 for chosen in tried
    ):  # what is left is too coarse: exceed it first
        tried += [_filled_up(blocks, start, budget, unit) for start in _one_more(blocks, tried[0])]

    def rank(chosen: list[Chosen]) -> tuple[float, float]:
        missed = abs(saved(blocks, chosen) - budget)
        return max(0.0, missed - 0.5001 * unit), error_of(blocks, chosen)

    return min(tried, key=rank)


def saved(blocks: Sequence[Choices], chosen: Sequence[Chosen]) -> float:
    """Return what choices save in total."""
    return sum(
        block.cost if levels is None else sum(_at(curve.cost, k) for curve, k in zip(block.curves, levels, strict=True))
        for block, levels in zip(blocks, chosen, strict=True)
    )


def error_of(blocks: Sequence[Choices], chosen: Sequence[Chosen]) -> float:
    """Return the sum of the errors of choices."""
    return sum(
        block.error
        if levels is None
        else sum(_at(curve.errors, k) for curve, k in zip(block.curves, levels, strict=True))
        for block, levels in zip(blocks, chosen, strict=True)
    )


def error_between(errors: Mapping[float, float], sparsity: Tensor) -> Tensor:
    """Interpolate errors over sparsity by powers of the sparsity, made non-decreasing; nothing removed is no error.

    Between two trials the error is ``c s^p`` through both, and below the first the power is that of the next segment,
    at least 1. Example: errors 1 and 4 at 0.1 and 0.2 are ``100 s²``, so that 0.05 has an error of 0.25.

    Args:
        errors: error at each of one or more sparsities above 0.
        sparsity: ``[g]`` float64, ascending, from 0 to the largest sparsity of ``errors``.

    Returns:
        ``[g]`` float64, the interpolated errors, ascending.
    """
    tried = sorted(errors)
    x = torch.tensor(tried, dtype=torch.float64).log()
    y = torch.tensor([errors[s] for s in tried], dtype=torch.float64).cummax(0).values.clamp_min(1e-12).log()
    power = y.diff() / x.diff()
    power = torch.cat([power[:1].clamp_min(1.0) if len(power) else torch.ones(1, dtype=torch.float64), power])
    segment = torch.searchsorted(x, sparsity.log()).clamp(max=len(x) - 1)
    found = (y[segment] + power[segment] * (sparsity.log() - x[segment])).exp()
    return torch.where(sparsity > 0, found, 0.0).cummax(0).values


def permitted(layer: Layer) -> Tensor:
    """Return the sparsities of a layer's units that its ``step`` allows, ``[levels]`` float64, ascending from 0.

    Example: of 10 units in steps of 4, 10, 8 or 4 are kept, so that the sparsities are 0, 0.2 and 0.6.
    """
    kept = torch.arange(layer.step, layer.units, layer.step, dtype=torch.float64)
    return 1 - torch.cat([kept, torch.tensor([layer.units], dtype=torch.float64)]).flip(0) / layer.units


def _at(values: Tensor, level: int) -> float:
    return float(values[level])


def _most(block: Choices) -> float:
    return sum(_at(curve.cost, -1) for curve in block.curves)


def _smallest(block: Choices) -> float:
    """Return the smallest saving of a single level, or of the block."""
    steps = [float(curve.cost.diff().min()) for curve in block.curves if len(curve.cost) > 1]
    return min(steps, default=block.cost or float("inf"))


def _cheapest(block: Choices, price: float) -> Chosen:
    """Return what minimises the error of a block minus what it saves at a price."""
    worth = [curve.errors - price * curve.cost for curve in block.curves]
    levels = [int(values.argmin()) for values in worth]
    of_units = sum(_at(values, k) for values, k in zip(worth, levels, strict=True))
    return None if block.error - price * block.cost < of_units else levels


def _between(below: list[Chosen], above: list[Chosen]) -> Iterator[list[Chosen]]:
    """Yield ``below`` as it is, and with one more of the blocks that only ``above`` removes each time."""
    chosen = list(below)
    yield list(chosen)
    for index, levels in enumerate(above):
        if levels is None and chosen[index] is not None:
            chosen[index] = None
            yield list(chosen)


def _one_more(blocks: Sequence[Choices], chosen: list[Chosen]) -> Iterator[list[Chosen]]:
    """Yield choices with one more level of a single curve, or without one more block."""
    for index, levels in enumerate(chosen):
        if levels is None:
            continue
        more = [[k + (place == kind) for place, k in enumerate(levels)] for kind in range(len(levels))]
        fit = [m for m in more if all(k < len(c.cost) for k, c in zip(m, blocks[index].curves, strict=True))]
        for instead in [*fit, *([None] if blocks[index].error < float("inf") else [])]:
            yield [*chosen[:index], instead, *chosen[index + 1 :]]


def _filled_up(blocks: Sequence[Choices], start: list[Chosen], budget: float, unit: float) -> list[Chosen]:
    """Add single levels to a choice, or take some away, the cheapest per saving first, to bring it to the budget.

    Args:
        blocks: as for ``weigh``.
        start: the choice.
        budget: as for ``weigh``.
        unit: smallest saving of a level; the budget is exceeded by at most half of it.
    """
    chosen = [None if levels is None else list(levels) for levels in start]
    missing = budget - saved(blocks, chosen)
    way = 1 if missing > 0 else -1
    heap: list[tuple[float, int, int, float]] = []

    def offer(index: int, kind: int) -> None:
        curve, levels = blocks[index].curves[kind], chosen[index]
        assert levels is not None
        here = levels[kind]
        if 0 <= here + way < len(curve.cost):
            saving = _at(curve.cost, here + way) - _at(curve.cost, here)
            price = (_at(curve.errors, here + way) - _at(curve.errors, here)) / saving
            heapq.heappush(heap, (way * price, index, kind, saving))

    for index, levels in enumerate(chosen):
        for kind in range(len(levels or ())):
            offer(index, kind)
    while heap:
        _, index, kind, saving = heapq.heappop(heap)
        if abs(saving) < abs(missing) + unit / 2:
            levels = chosen[index]
            assert levels is not None
            levels[kind] += way
            missing -= saving
            offer(index, kind)
    return chosen
