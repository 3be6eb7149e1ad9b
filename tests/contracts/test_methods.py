"""What every scorer, allocator and solver promises, checked on all that are discovered."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from docstring_parser import parse_from_object
from torch import Tensor

from lit_prune import allocators, scorers, solvers
from lit_prune.allocators.base import Allocator, Layer
from lit_prune.errors import InputError
from lit_prune.introspection import describe
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured
from lit_prune.ops.stats import COLLECTABLE
from lit_prune.scorers.base import Scorer
from lit_prune.solvers.base import Solver
from support.rounding import distance, stable

METHODS = [*scorers.METHODS.values(), *allocators.METHODS.values(), *solvers.METHODS.values()]
PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.3, "row"),
    Unstructured(0.52, "row"),
    Unstructured(0.9),
    Unstructured(0.0),
    NM(2, 4),
    NM(1, 4),
]
OUTPUTS, INPUTS = 10, 24  # not square, on purpose


def by_name(cls: type) -> str:
    return cls.__name__


def make_layer(dtype: torch.dtype = torch.float32, order: Tensor | None = None) -> tuple[Tensor, LayerStats, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    statistics = torch.promote_types(dtype, torch.float32)  # "float32 or better"
    inputs = (torch.randn(4, 20, INPUTS, generator=generator) @ mixing).to(statistics)
    gradients = (torch.randn(3, OUTPUTS, INPUTS, generator=generator) * 0.01).to(statistics)
    stats = LayerStats.from_inputs(inputs, gradients if order is None else gradients[:, order])
    return weight, stats, torch.rand(OUTPUTS, INPUTS, generator=generator).to(statistics)


def twenty_solves(stats: LayerStats) -> float:
    """Return how far two ways may be apart that each solve with the Gram matrix twenty times, in float64."""
    return 20 * stable(stats.gram)


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_a_method_is_final_documented_and_alone_in_its_file(method: type) -> None:
    assert getattr(method, "__final__", False)
    module = inspect.getmodule(method)
    in_file = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == method.__module__]
    assert in_file == [method]
    assert "class_path: " + method.__name__ in (method.__doc__ or "")
    assert is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    documented = {entry.arg_name: entry.description for entry in parse_from_object(method).params}
    assert all(documented.get(parameter) for parameter in inspect.signature(method).parameters)


@pytest.mark.parametrize("scorer", scorers.METHODS.values(), ids=by_name)
class TestScorers:
    def test_scores_are_finite_float32_and_of_the_weights_shape(self, scorer: type[Scorer]) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            weight, stats, _ = make_layer(dtype)
            score = scorer().score(weight, stats)
            assert score.shape == weight.shape
            assert score.dtype == torch.float32
            assert score.isfinite().all()

    def test_arguments_are_not_changed(self, scorer: type[Scorer]) -> None:
        weight, stats, _ = make_layer()
        before, gram = weight.clone(), stats.gram.clone()
        scorer().score(weight, stats)
        assert torch.equal(weight, before)
        assert torch.equal(stats.gram, gram)

    def test_permuting_outputs_permutes_scores(self, scorer: type[Scorer]) -> None:
        weight, stats, _ = make_layer(torch.float64)
        order = torch.randperm(OUTPUTS)
        _, permuted, _ = make_layer(torch.float64, order)
        score = scorer().score(weight, stats)[order]
        assert distance(scorer().score(weight[order], permuted), score) <= twenty_solves(stats)

    def test_needs_can_be_collected(self, scorer: type[Scorer]) -> None:
        assert scorer.needs <= COLLECTABLE


@pytest.mark.parametrize("solver", solvers.METHODS.values(), ids=by_name)
class TestSolvers:
    @pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
    @pytest.mark.parametrize("scored", [False, True])
    def test_the_pattern_is_met_exactly(self, solver: type[Solver], pattern: Pattern, scored: bool) -> None:
        if not scored and solver.needs_score:
            pytest.skip("needs a score")
        for dtype in (torch.float32, torch.bfloat16):
            weight, stats, score = make_layer(dtype)
            solution = solver().solve(weight, stats, pattern, score if scored else None)
            assert solution.weight.dtype == dtype
            assert solution.weight.shape == solution.keep.shape == weight.shape
            assert solution.weight.isfinite().all()
            assert (solution.weight[~solution.keep] == 0).all()
            assert (solution.keep == pattern.mask(solution.keep.float())).all()  # the counts are the pattern's
            if isinstance(pattern, Unstructured):
                assert (~solution.keep).sum() == round(pattern.sparsity * weight.numel())

    @pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.6, "row"), NM(2, 4)], ids=repr)
    @pytest.mark.parametrize("scored", [False, True])
    def test_what_is_not_allowed_stays_pruned(self, solver: type[Solver], pattern: Pattern, scored: bool) -> None:
        if not scored and solver.needs_score:
            pytest.skip("needs a score")
        weight, stats, score = make_layer()
        # As uneven as the pattern lets it be: an earlier, milder pruning by scores that have nothing to do with these.
        earlier = NM(3, 4) if isinstance(pattern, NM) else pattern.at(pattern.sparsity - 0.05)
        for seed in range(5):
            scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
            scores[:, -8:] -= 0.0 if isinstance(pattern, NM) else 0.6  # the last columns are nearly empty
            allowed = earlier.mask(scores)
            solution = solver().solve(weight, stats, pattern, score if scored else None, allowed)
            assert not (solution.keep & ~allowed).any()
            assert (solution.keep == pattern.mask(solution.keep.float())).all()

    def test_too_few_allowed_weights_are_refused(self, solver: type[Solver]) -> None:
        weight, stats, score = make_layer()
        with pytest.raises(InputError, match="keeps weights that were pruned before"):
            solver().solve(weight, stats, Unstructured(0.5), score, torch.rand(weight.shape) > 0.6)

    def test_arguments_are_not_changed(self, solver: type[Solver]) -> None:
        weight, stats, score = make_layer()
        copies = weight.clone(), stats.gram.clone(), score.clone()
        solver().solve(weight, stats, Unstructured(0.5), score)
        for now, before in zip((weight, stats.gram, score), copies, strict=True):
            assert torch.equal(now, before)

    def test_nothing_pruned_is_nothing_changed(self, solver: type[Solver]) -> None:
        weight, stats, score = make_layer(torch.float64)
        solution = solver().solve(weight, stats, Unstructured(0.0), score)
        assert distance(solution.weight, weight) <= twenty_solves(stats)

    def test_permuting_outputs_permutes_the_solution(self, solver: type[Solver]) -> None:
        weight, stats, score = make_layer(torch.float64)
        order = torch.randperm(OUTPUTS)
        pattern = Unstructured(0.5, "row")
        straight = solver().solve(weight, stats, pattern, score)
        permuted = solver().solve(weight[order], stats, pattern, score[order])
        assert torch.equal(permuted.keep, straight.keep[order])
        assert distance(permuted.weight, straight.weight[order]) <= twenty_solves(stats)

    def test_indivisible_inputs_are_refused(self, solver: type[Solver]) -> None:
        weight, score = torch.randn(4, 30), torch.rand(4, 30)
        stats = LayerStats.from_inputs(torch.randn(2, 40, 30))
        with pytest.raises(InputError, match="divisible by 4"):
            solver().solve(weight, stats, NM(2, 4), score)


def make_layers() -> list[Layer]:
    shapes = [(8, 8), (4, 8), (16, 8), (8, 16)] * 3
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]
    return [Layer(f"layers.{k}", k // 4, tuple(w.shape), lambda w=w: w) for k, w in enumerate(weights)]


def observed(allocator: Allocator, layers: list[Layer], target: float) -> list[Layer]:
    """Show the allocator every block, as the engine does."""
    if not allocator.needs:
        return layers
    stats = [LayerStats.from_inputs(torch.randn(2, 9, layer.shape[1])) for layer in layers]
    seen = {
        block: allocator.observe(
            layers[4 * block : 4 * block + 4],
            stats[4 * block : 4 * block + 4],
            Unstructured(target),
            lambda pattern, block=block: (1 + block) * pattern.sparsity**2,
        )
        for block in range(3)
    }
    return [replace(layer, evidence=seen[layer.block]) for layer in layers]


@pytest.fixture
def make_allocator(tmp_path: Path) -> Callable[[type[Allocator]], Allocator]:
    def make(cls: type[Allocator], **init_args: Any) -> Allocator:
        if cls.__name__ == "FromFile":
            path = tmp_path / "allocation.json"
            path.write_text(json.dumps({f"layers.{k}": 0.1 + 0.07 * k for k in range(12)}))
            init_args["path"] = str(path)
        return cls(**init_args)

    return make


def mean(layers: Sequence[Layer], sparsity: dict[str, float]) -> float:
    return sum(sparsity[layer.name] * layer.numel for layer in layers) / sum(layer.numel for layer in layers)


@pytest.mark.parametrize("allocator", allocators.METHODS.values(), ids=by_name)
class TestAllocators:
    @pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.8, 0.95])
    def test_the_budget_is_met_exactly(
        self, allocator: type[Allocator], target: float, make_allocator: Callable[..., Allocator]
    ) -> None:
        method, layers = make_allocator(allocator), make_layers()
        sparsity = method.allocate(observed(method, layers, target), target)
        assert list(sparsity) == [layer.name for layer in layers]
        assert mean(layers, sparsity) == pytest.approx(target, abs=1e-9)
        assert all(0 <= value < 1 for value in sparsity.values())

    def test_bounds_hold(self, allocator: type[Allocator], make_allocator: Callable[..., Allocator]) -> None:
        if "max_sparsity" not in inspect.signature(allocator).parameters:
            pytest.skip("has no bounds")
        layers = make_layers()
        method = make_allocator(allocator, min_sparsity=0.5, max_sparsity=0.7)
        sparsity = method.allocate(observed(method, layers, 0.6), 0.6)
        assert mean(layers, sparsity) == pytest.approx(0.6, abs=1e-9)
        assert all(0.5 <= value <= 0.7 for value in sparsity.values())

    def test_a_description_rebuilds_the_method(
        self, allocator: type[Allocator], make_allocator: Callable[..., Allocator]
    ) -> None:
        method = make_allocator(allocator)
        assert describe(type(method)(**describe(method)["init_args"])) == describe(method)


@pytest.mark.parametrize("method", [*scorers.METHODS.values(), *solvers.METHODS.values()], ids=by_name)
def test_a_description_rebuilds_the_method(method: type) -> None:
    description = describe(method())
    assert description["class_path"] == method.__name__
    assert describe(method(**description["init_args"])) == description
    json.dumps(description)
