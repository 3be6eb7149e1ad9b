"""Contract tests for scorers, solvers and allocators, including user-defined ones.

.. code-block:: python

    from lit_prune.testing import check_scorer

    check_scorer(MyScorer())

Each function raises an ``AssertionError`` that names the first violated requirement. The layers are small and not
square; neither a model nor a test framework is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lit_prune.allocators.base import Allocator, Layer, Trial
from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Structured, Unstructured
from lit_prune.ops.stats import COLLECTABLE
from lit_prune.scorers.base import Scorer
from lit_prune.solvers.base import Solver

OUTPUTS, INPUTS = 10, 24
PATTERNS = (
    Unstructured(0.5),
    Unstructured(0.3, "row"),
    Unstructured(0.52, "row"),
    Unstructured(0.9),
    Unstructured(0.0),
    NM(2, 4),
    NM(1, 4),
    Structured(0.25),
    Structured(0.0).of_layer(torch.arange(24).reshape(2, 12).T.reshape(6, 4), 2),  # columns that are not neighbours
)
TARGETS = (0.0, 0.3, 0.5, 0.8, 0.95)
_SOLVES = 20
"""Assumed number of successive solves with a Gram matrix in a method, for the bound on its rounding error."""


def check_scorer(scorer: Scorer) -> None:
    """Check the contract of a scorer; see ``Scorer.score``.

    Scores are finite, in float32, and have the weight's shape; arguments are not modified; permuted outputs have
    permuted scores; ``needs`` can be collected.

    Raises:
        AssertionError: if the contract is violated; names the requirement.
    """
    _require(isinstance(scorer, Scorer), f"{scorer!r} is not a Scorer: derive its class from lit_prune.scorers.Scorer")
    _require(scorer.needs <= COLLECTABLE, f"needs are {set(scorer.needs)}: of {set(COLLECTABLE)} only")
    for dtype in (torch.float32, torch.bfloat16):
        weight, stats, _ = make_layer(dtype)
        with _unchanged(weight, stats.gram):
            score = scorer.score(weight, stats)
        _require(score.shape == weight.shape, f"scores are {list(score.shape)}, the weight is {list(weight.shape)}")
        _require(score.dtype == torch.float32, f"scores of a weight in {dtype} are {score.dtype}, and not float32")
        _require(bool(score.isfinite().all()), f"scores of a weight in {dtype} hold NaN or Inf")
    weight, stats, _ = make_layer(torch.float64)
    order = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(1))
    permuted = scorer.score(weight[order], make_layer(torch.float64, order)[1])
    _require_equal(permuted, scorer.score(weight, stats)[order], stats, "permuted outputs have other scores")


def check_solver(solver: Solver) -> None:
    """Check the contract of a solver; see ``Solver.solve``.

    The mask has exactly the pattern's counts and the weight is zero outside it, with and without a score; only
    ``allowed`` weights are kept; arguments are not modified; a pattern that prunes nothing changes nothing; permuted
    outputs have the permuted solution; requests that cannot be met raise ``InputError``.

    Raises:
        AssertionError: if the contract is violated; names the requirement.
    """
    _require(isinstance(solver, Solver), f"{solver!r} is not a Solver: derive its class from lit_prune.solvers.Solver")
    _require(solver.needs <= COLLECTABLE, f"needs are {set(solver.needs)}: of {set(COLLECTABLE)} only")
    for scored in (True,) if solver.needs_score else (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for pattern in PATTERNS:
                _check_pattern(solver, pattern, dtype, scored)
        for pattern in (Unstructured(0.5), Unstructured(0.6, "row"), NM(2, 4)):
            _check_allowed(solver, pattern, scored)
    _check_refusals(solver)
    weight, stats, score = make_layer(torch.float64)
    dense = solver.solve(weight, stats, Unstructured(0.0), score)
    _require_equal(dense.weight, weight, stats, "a pattern that prunes nothing changes the weight")
    order = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(1))
    straight = solver.solve(weight, stats, Unstructured(0.5, "row"), score)
    permuted = solver.solve(weight[order], stats, Unstructured(0.5, "row"), score[order])
    _require(torch.equal(permuted.keep, straight.keep[order]), "permuted outputs have another mask")
    _require_equal(permuted.weight, straight.weight[order], stats, "permuted outputs have another solution")


def check_allocator(allocator: Allocator) -> None:
    """Check the contract of an allocator; see ``Allocator.allocate``.

    There is a sparsity for every layer, in order; their mean, weighted by parameters, is the target; they are in
    [0, 1), and within ``min_sparsity`` and ``max_sparsity`` if the allocator has these bounds.

    Raises:
        AssertionError: if the contract is violated; names the requirement.
    """
    _require(
        isinstance(allocator, Allocator),
        f"{allocator!r} is not an Allocator: derive its class from lit_prune.allocators.Allocator",
    )
    low, high = getattr(allocator, "min_sparsity", 0.0), getattr(allocator, "max_sparsity", 1.0)
    for target in TARGETS:
        if not low <= target <= high:
            continue
        layers = make_layers()
        found = allocator.allocate(_observed(allocator, layers, target), target)
        _require(list(found) == [layer.name for layer in layers], "sparsities are not of all layers, in their order")
        total = sum(layer.numel for layer in layers)
        mean = sum(found[layer.name] * layer.numel for layer in layers) / total
        # The budget is met to far less than one weight: to the rounding error of a sum over the weights in float64.
        _require(abs(mean - target) <= total * torch.finfo(torch.float64).eps, f"at {target} the mean is {mean!r}")
        outside = {name: value for name, value in found.items() if not (low <= value <= high and 0 <= value < 1)}
        _require(not outside, f"at {target} sparsities are out of bounds: {outside}")


def make_layer(dtype: torch.dtype = torch.float32, order: Tensor | None = None) -> tuple[Tensor, LayerStats, Tensor]:
    """Return a deterministic weight ``[10, 24]``, statistics of its inputs and gradients, and scores.

    Args:
        dtype: dtype of the weight; statistics are in float32 or float64.
        order: permutation of the outputs, for the gradients; None = none.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    statistics = torch.promote_types(dtype, torch.float32)
    inputs = (torch.randn(4, 20, INPUTS, generator=generator) @ mixing).to(statistics)
    gradients = (torch.randn(3, OUTPUTS, INPUTS, generator=generator) * 0.01).to(statistics)
    stats = LayerStats.from_inputs(inputs, gradients if order is None else gradients[:, order])
    return weight, stats, torch.rand(OUTPUTS, INPUTS, generator=generator).to(statistics)


def make_layers() -> list[Layer]:
    """Return twelve deterministic layers in three blocks, with four shapes."""
    shapes = [(8, 8), (4, 8), (16, 8), (8, 16)] * 3
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]
    return [Layer(f"layers.{k}", k // 4, (w.shape[0], w.shape[1]), lambda w=w: w) for k, w in enumerate(weights)]  # type: ignore[misc]


def stable(matrix: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """Return the bound on the relative error, in norms, of a backward stable algorithm for a matrix."""
    return float(torch.linalg.cond(matrix.double())) * torch.finfo(dtype).eps


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of ``expected``."""
    whole = float(expected.double().norm())
    return float((actual.double() - expected.double()).norm()) / (whole or 1.0)


def _check_pattern(solver: Solver, pattern: Pattern, dtype: torch.dtype, scored: bool) -> None:
    about = f"at {pattern!r} in {dtype}, {'from' if scored else 'without'} a score,"
    weight, stats, score = make_layer(dtype)
    with _unchanged(weight, stats.gram, score):
        solution = solver.solve(weight, stats, pattern, score if scored else None)
    _require(solution.weight.dtype == dtype, f"{about} the weight comes out in {solution.weight.dtype}")
    _require(solution.weight.shape == solution.keep.shape == weight.shape, f"{about} shapes change")
    _require(bool(solution.weight.isfinite().all()), f"{about} the weight holds NaN or Inf")
    _require(bool((solution.weight[~solution.keep] == 0).all()), f"{about} pruned weights are not zero")
    _require(torch.equal(solution.keep, pattern.mask(solution.keep.float())), f"{about} the mask has other counts")
    if isinstance(pattern, Unstructured):
        pruned = int((~solution.keep).sum())
        _require(pruned == round(pattern.sparsity * weight.numel()), f"{about} {pruned} weights are pruned")


def _check_allowed(solver: Solver, pattern: Pattern, scored: bool) -> None:
    """Prune within an earlier, milder mask that is as uneven as the pattern permits, selected by independent scores."""
    weight, stats, score = make_layer()
    earlier = NM(3, 4) if isinstance(pattern, NM) else pattern.at(pattern.sparsity - 0.05)
    for seed in range(5):
        scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        scores[:, -8:] -= 0.0 if isinstance(pattern, NM) else 0.6  # almost no weights are allowed in the last columns
        allowed = earlier.mask(scores)
        keep = solver.solve(weight, stats, pattern, score if scored else None, allowed).keep
        _require(not bool((keep & ~allowed).any()), f"at {pattern!r} weights that are not allowed are kept")
        _require(torch.equal(keep, pattern.mask(keep.float())), f"at {pattern!r} within a mask the counts are others")


def _check_refusals(solver: Solver) -> None:
    weight, stats, score = make_layer()
    few = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.6
    with _refused("too few allowed weights are not refused with InputError"):
        solver.solve(weight, stats, Unstructured(0.5), score, few)
    inputs = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
    with _refused("2:4 of a weight with 30 inputs is not refused with InputError"):
        solver.solve(inputs[0, :4], LayerStats.from_inputs(inputs), NM(2, 4), inputs[1, :4].abs())


def _observed(allocator: Allocator, layers: Sequence[Layer], target: float) -> list[Layer]:
    """Let the allocator observe every block, as the engine does."""
    if not allocator.needs:
        return list(layers)
    generator = torch.Generator().manual_seed(0)
    stats = [LayerStats.from_inputs(torch.randn(2, 9, layer.shape[1], generator=generator)) for layer in layers]
    seen = {
        block: allocator.observe(
            layers[4 * block : 4 * block + 4],
            stats[4 * block : 4 * block + 4],
            Unstructured(target),
            lambda pattern, block=block: Trial((1 + block) * pattern.sparsity**2, 1),  # type: ignore[misc]
        )
        for block in range(3)
    }
    return [replace(layer, evidence=seen[layer.block]) for layer in layers]


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(promise)


def _require_equal(actual: Tensor, expected: Tensor, stats: LayerStats, promise: str) -> None:
    """Require two float64 results to be equal up to rounding."""
    gap, bound = distance(actual, expected), _SOLVES * stable(stats.gram)
    _require(gap <= bound, f"{promise}: apart by {gap:.2g}, and rounding can do {bound:.2g}")


@contextmanager
def _unchanged(*tensors: Tensor) -> Iterator[None]:
    copies = [tensor.clone() for tensor in tensors]
    yield
    _require(all(map(torch.equal, tensors, copies)), "an argument is changed in place")


@contextmanager
def _refused(promise: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        return
    raise AssertionError(promise)
