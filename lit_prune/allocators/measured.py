"""Measured: the allocation that minimises the blocks' output errors, measured at a few sparsities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from lit_prune.allocators.base import Allocator, Layer, Trial, check_bounds, check_budget, meet_budget
from lit_prune.allocators.weighing import Choices, Curve, error_between, permitted, weigh
from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Structured
from lit_prune.ops.structured import Unit

Budget = Literal["parameters", "time"]
_TRIALS = 3
"""Number of sparsities at which a block, or one kind of its units, is tried."""
_GRID = 1001
"""Number of candidate sparsities per block, from the lowest trial to the highest."""
_NO_ERROR = 1e-12
"""Lower bound of an error, because zero has no logarithm."""


@final
@dataclass(frozen=True)
class Measured(Allocator):
    """``min Σ_b e_b(s_b)`` at the budget: higher sparsity for the blocks in which it costs the least output error.

    ``e_b(s)`` is the output error of a dense block whose layers are pruned to the sparsity ``s`` with the plan's own
    scorer and solver: ``mean_t ||B'(h)_t - B(h)_t||² / ||B(h)_t||²`` over the calibration tokens. It is measured at the
    target and ``spread`` below and above it (at most half of the way to 0 and to 1; for N:M at integer N, at least one
    apart), and interpolated in between: its logarithm by a non-decreasing parabola. The sparsity of a block stays
    within the measured range, and all layers of a block get the same sparsity. Costs three solves of every block with
    the solver's draft, and five forward passes over some of the sequences.

    The output errors of dense blocks do not include how later blocks amplify an error. They can be combined with
    another allocator, the prior: each sparsity is then ``trust * measured + (1 - trust) * prior``. The method is this
    project's own.

    If a structured pattern has several kinds of units, they are weighed against each other. Every kind of every block
    is tried alone at three sparsities, up to ``2 * spread`` above the target, or up to ``spread`` above where the
    largest kind would meet it alone; and if ``blocks`` may go, the block is left out. At one price per weight for all,
    the units are removed that cost the least error, in whole units, until the budget is met to half of the smallest
    one; a block whose removal is cheapest goes entirely. ``budget: time`` weighs seconds in place of weights, and
    ``sparsity`` is a fraction of the seconds of the units, or of whole blocks if these may go: how much faster a block
    gets without half of its units of a kind is timed on this machine, for a prompt as long as a calibration sequence
    and 32 single tokens. Such an allocation differs from machine to machine.

    .. code-block:: yaml

        allocator: {class_path: Measured, init_args: {spread: 0.1, prior: {class_path: AlphaPruning}, trust: 0.5}}
    """

    spread: float = 0.1
    """Distance of the lowest and highest measured sparsity from the target."""
    prior: Allocator | None = None
    """Another allocator to combine with; null = none."""
    trust: float = 0.5
    """Weight of the measured allocation relative to the prior, in [0, 1]; ignored without a prior."""
    sequences: int | None = 8
    """Number of calibration sequences on which blocks are measured, also for the prior's observations; null = all."""
    min_sparsity: float = 0.0
    """Lowest sparsity of a layer."""
    max_sparsity: float = 0.99
    """Highest sparsity of a layer, except in blocks that are removed."""
    budget: Budget = "parameters"
    """What ``sparsity`` is a fraction of, and what units of a structured pattern are weighed by: ``parameters``, or the
    ``time`` that they take on this machine."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not 0 < self.spread < 1:
            raise InputError(f"spread is {self.spread!r}: it must be in (0, 1), such as 0.1")
        if not 0 <= self.trust <= 1:
            raise InputError(f"trust is {self.trust!r}: it must be in [0, 1], such as 0.5")
        if self.sequences is not None and self.sequences < 1:
            raise InputError(f"sequences is {self.sequences!r}: it must be 1 or more, or null for all")
        if self.budget not in get_args(Budget):
            raise InputError(f"budget is {self.budget!r}: it must be one of {', '.join(get_args(Budget))}")
        check_bounds(self.min_sparsity, self.max_sparsity)

    def check(self, pattern: Pattern) -> None:
        """Raise ``InputError`` if a plan's pattern does not go with the arguments."""
        if self.budget == "time" and not isinstance(pattern, Structured):
            raise InputError(
                f"plan.allocator.budget is 'time', and plan.pattern is {type(pattern).__name__}: single zeros save no "
                "time; use Structured"
            )
        if self._weighs(pattern) and (self.prior or self.min_sparsity):
            name, value = ("prior", self.prior) if self.prior else ("min_sparsity", self.min_sparsity)
            raise InputError(
                f"plan.allocator.{name} is {value!r}: it says nothing about which kind of units to remove; leave it out"
            )

    def _weighs(self, pattern: Pattern) -> bool:
        """Return whether kinds of units are weighed against each other."""
        return isinstance(pattern, Structured) and (len(pattern.units) > 1 or self.budget == "time")

    def trials(self, pattern: Pattern) -> int:
        """Return the number of times that a block is tried."""
        if not self._weighs(pattern):
            return _TRIALS
        assert isinstance(pattern, Structured)
        return sum(1 if unit == "blocks" else _TRIALS for unit in pattern.units)

    @property
    def needs(self) -> frozenset[str]:
        """Output errors of the dense blocks, their times if they are the budget, and the prior's needs."""
        mine = {"output_error", "seconds"} if self.budget == "time" else {"output_error"}
        return frozenset(mine) | (self.prior.needs if self.prior else frozenset())

    @property
    def observed_sequences(self) -> int | None:
        """Number of calibration sequences on which ``observe`` is called, ``sequences``."""
        return self.sequences

    @property
    def metric_name(self) -> str | None:
        """Name of the prior's metric; None without a prior."""
        return self.prior.metric_name if self.prior else None

    def measure(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return the prior's metrics by layer name."""
        return self.prior.measure(layers) if self.prior else {}

    def observe(
        self,
        layers: Sequence[Layer],
        stats: Sequence[LayerStats],
        pattern: Pattern,
        output_error: Callable[[Pattern], Trial],
    ) -> dict[str, Any]:
        """Return what ``allocate`` needs to know of a block.

        Either ``errors``, the block's output error by sparsity, and ``prior``, the prior's observations; or, if units
        are weighed, ``whole``, what all units of each kind cost, by kind, and ``choices``, what may be removed.
        """
        check_budget(pattern.sparsity, self.min_sparsity, self.max_sparsity)
        if self._weighs(pattern):
            assert isinstance(pattern, Structured)
            return self._weighed(layers, pattern, output_error)
        trials = {trial.sparsity: trial for trial in self._trials(pattern)}
        prior = self.prior.observe(layers, stats, pattern, output_error) if self.prior and self.prior.needs else None
        return {"errors": {s: output_error(trial).error for s, trial in sorted(trials.items())}, "prior": prior}

    def _weighed(
        self, layers: Sequence[Layer], pattern: Structured, output_error: Callable[[Pattern], Trial]
    ) -> dict[str, Any]:
        """Try every kind of a block's units alone, and the block without its layers if it may be removed."""
        whole, curves = {}, []
        sizes = {unit: sum(layer.numel for layer in layers if layer.unit == unit) for unit in get_args(Unit)}
        largest = max(sizes.values())
        for unit in get_args(Unit):
            mine = [layer for layer in layers if layer.unit == unit]
            if not mine:  # blocks, or a kind that this block does not have, or that is to be left alone
                continue
            levels = permitted(max(mine, key=lambda layer: layer.units))
            levels = levels[levels <= self.max_sparsity]
            numel, errors = sizes[unit], {}
            cost = 0.0 if self.budget == "time" else float(numel)
            # The largest kind may have to meet the target alone.
            alone = pattern.sparsity * sum(layer.numel for layer in layers) / numel if numel == largest else 0.0
            for sparsity in self._unit_trials(levels, pattern.sparsity, alone):
                trial = output_error(pattern.only(unit).at(sparsity))
                errors[trial.removed / numel] = trial.error
                cost = max(0.0, self._cost(trial) * numel / trial.removed)  # a time is a difference of two
            whole[unit] = cost
            if cost > 0 and errors:
                levels = levels[levels <= max(errors) + 1e-9]
                curves.append(Curve(unit, levels * cost, error_between(errors, levels)))
        if "blocks" not in pattern.units:
            return {"whole": whole, "choices": Choices(tuple(curves))}
        trial = output_error(pattern.only("blocks"))
        return {"whole": whole, "choices": Choices(tuple(curves), self._cost(trial), trial.error)}

    def _cost(self, trial: Trial) -> float:
        return trial.seconds if self.budget == "time" else trial.removed

    def _unit_trials(self, levels: Tensor, target: float, alone: float) -> list[float]:
        """Return the sparsities at which to try one kind of units, up to three of the permitted ``levels`` ``[n]``."""
        high = min(max(target + 2 * self.spread, alone + self.spread), (max(target, alone) + 1) / 2)
        tried: list[int] = []
        for part in (0.25, 0.5, 1):
            nearest = int((levels - part * high).abs().argmin())
            tried.append(max(nearest, tried[-1] + 1 if tried else 1))
        return [float(levels[k]) for k in tried if k < len(levels)]

    def _trials(self, pattern: Pattern) -> list[Pattern]:
        target = pattern.sparsity
        step = max(self.spread, 1 / pattern.of) if isinstance(pattern, NM) else self.spread
        low = max(target - step, target / 2, self.min_sparsity)
        high = min(target + step, (target + 1) / 2, self.max_sparsity)
        return [pattern.at(low), pattern, pattern.at(high)]

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer by name; see ``Allocator.allocate``."""
        if any(layer.evidence is None for layer in layers):
            raise InputError("Measured got no output errors: it must try every block of the dense model first")
        if "choices" in layers[0].evidence:
            return _allocate_units(layers, target)
        errors = {layer.block: layer.evidence["errors"] for layer in layers}
        low = max(self.min_sparsity, *(min(tried) for tried in errors.values()))
        high = min(self.max_sparsity, *(max(tried) for tried in errors.values()))
        check_budget(target, low, high)
        grid = torch.linspace(low, high, _GRID, dtype=torch.float64)
        curves = torch.stack([error_curve(tried, grid) for tried in errors.values()])
        sizes = torch.tensor([sum(layer.numel for layer in layers if layer.block == block) for block in errors])
        cheapest = dict(zip(errors, minimise(curves, grid, sizes / sizes.sum().double(), target).tolist(), strict=True))
        proposed = {layer.name: cheapest[layer.block] for layer in layers}
        if self.prior:
            known = [replace(layer, evidence=layer.evidence["prior"]) for layer in layers]
            theirs = self.prior.allocate(known, target)
            proposed = {name: self.trust * mine + (1 - self.trust) * theirs[name] for name, mine in proposed.items()}
        return meet_budget(layers, proposed, target, self.min_sparsity, self.max_sparsity)


def _allocate_units(layers: Sequence[Layer], target: float) -> dict[str, float]:
    """Return the sparsity of every layer by name, from trials of each kind of units; 1 in blocks that are removed."""
    seen = {layer.block: layer.evidence for layer in layers}
    choices = [evidence["choices"] for evidence in seen.values()]
    total = sum(evidence["choices"].cost or sum(evidence["whole"].values()) for evidence in seen.values())
    if total <= 0:
        raise InputError("the units take no time that can be measured here: set plan.allocator.budget to parameters")
    chosen = dict(zip(seen, weigh(choices, target * total), strict=True))
    sparsity = {}
    for layer in layers:
        levels, evidence = chosen[layer.block], seen[layer.block]
        if levels is None:
            sparsity[layer.name] = 1.0
            continue
        removed = {c.unit: float(c.cost[k]) for c, k in zip(evidence["choices"].curves, levels, strict=True)}
        sparsity[layer.name] = removed[layer.unit] / evidence["whole"][layer.unit] if layer.unit in removed else 0.0
    return sparsity


def error_curve(errors: Mapping[float, float], grid: Tensor) -> Tensor:
    """Interpolate the logarithms of errors over sparsity by a polynomial through all of them, made non-decreasing.

    Args:
        errors: error at each of one to three sparsities.
        grid: ``[g]`` float64, ascending sparsities within the range of ``errors``.

    Returns:
        ``[g]`` float64, the interpolated errors, ascending.
    """
    tried = sorted(errors)
    logs = torch.tensor([errors[s] for s in tried], dtype=grid.dtype).clamp_min(_NO_ERROR).log().cummax(0).values
    total = torch.zeros_like(grid)
    for here, log in zip(tried, logs, strict=True):
        total += log * prod((grid - other) / (here - other) for other in tried if other != here)
    return total.clamp(logs[0], logs[-1]).cummax(0).values.exp()


def minimise(curves: Tensor, grid: Tensor, shares: Tensor, target: float) -> Tensor:
    """Return the sparsities ``s_b`` that minimise ``Σ_b curves_b(s_b)`` subject to ``Σ_b shares_b s_b = target``.

    Each block takes the grid point that minimises its error minus a multiplier times the weights removed; the Lagrange
    multiplier is found by bisection. If blocks jump over the target at one multiplier, they are interpolated by the
    same fraction to meet it.

    Args:
        curves: ``[blocks, g]``, ascending errors.
        grid: ``[g]``, sparsities of the errors.
        shares: ``[blocks]``, fraction of all weights in each block.
        target: weighted mean to meet, within the grid.
    """
    below, above = torch.full_like(shares, grid[0].item()), torch.full_like(shares, grid[-1].item())
    removed = shares[:, None] * grid
    low, high = 0.0, (curves.diff() / removed.diff()).nan_to_num().max().item()
    for _ in range(100):
        price = (low + high) / 2
        chosen = grid[(curves - price * removed).argmin(1)]
        if (shares * chosen).sum() <= target:
            low, below = price, chosen
        else:
            high, above = price, chosen
    gap = (shares * (above - below)).sum()
    way = (target - (shares * below).sum()) / gap if gap > 0 else torch.zeros_like(gap)
    return below + way * (above - below)
