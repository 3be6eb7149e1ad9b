"""What scorers, allocators and solvers promise, checked on all that are discovered; and that the checks can fail."""

import inspect
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from docstring_parser import parse_from_object
from torch import Tensor

from lit_prune import allocators, scorers, solvers
from lit_prune.allocators import Allocator, Uniform
from lit_prune.ops import LayerStats, Pattern
from lit_prune.scorers import Scorer, Wanda
from lit_prune.solvers import Solver, Zero
from lit_prune.solvers.base import Solution
from lit_prune.testing import check_allocator, check_scorer, check_solver

METHODS = [*scorers.METHODS.values(), *allocators.METHODS.values(), *solvers.METHODS.values()]


def by_name(cls: type) -> str:
    return cls.__name__


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
def test_a_scorer_keeps_its_promises(scorer: type[Scorer]) -> None:
    check_scorer(scorer())


@pytest.mark.parametrize("solver", solvers.METHODS.values(), ids=by_name)
def test_a_solver_keeps_its_promises(solver: type[Solver]) -> None:
    check_solver(solver())


@pytest.fixture
def make_allocator(tmp_path: Path) -> Callable[[type[Allocator]], Allocator]:
    def make(cls: type[Allocator], **init_args: Any) -> Allocator:
        if cls.__name__ == "FromFile":
            path = tmp_path / "allocation.json"
            path.write_text(json.dumps({f"layers.{k}": 0.1 + 0.07 * k for k in range(12)}))
            init_args["path"] = str(path)
        return cls(**init_args)

    return make


@pytest.mark.parametrize("allocator", allocators.METHODS.values(), ids=by_name)
def test_an_allocator_keeps_its_promises(allocator: type[Allocator], make_allocator: Callable[..., Allocator]) -> None:
    method = make_allocator(allocator)
    check_allocator(method)
    if "max_sparsity" in inspect.signature(allocator).parameters:
        check_allocator(make_allocator(allocator, min_sparsity=0.45, max_sparsity=0.7))
    assert eval(repr(method), dict(allocators.METHODS)) == method


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_a_method_is_a_frozen_dataclass_whose_repr_is_its_constructor_call(
    method: type, make_allocator: Callable[..., Allocator]
) -> None:
    made = make_allocator(method) if issubclass(method, Allocator) else method()
    assert eval(repr(made), {cls.__name__: cls for cls in METHODS}) == made
    with pytest.raises(FrozenInstanceError):
        made.anything = 1


class NoScorer:
    pass


class Spoiled(Scorer):
    """A scorer that breaks one promise."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.spoil = spoil

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return self.spoil(weight, Wanda().score(weight, stats))


class Demanding(Spoiled):
    needs = frozenset({"hessian"})


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (NoScorer(), "is not a Scorer"),
        (Demanding(lambda _, score: score), "needs are {'hessian'}"),
        (Spoiled(lambda _, score: score.T), r"scores are \[24, 10\], the weight is \[10, 24\]"),
        (Spoiled(lambda _, score: score.half()), "and not float32"),
        (Spoiled(lambda _, score: score.log().sub(score.log())), None),
        (Spoiled(lambda _, score: score / 0), "hold NaN or Inf"),
        (Spoiled(lambda weight, score: weight.zero_().float() + score), "an argument is changed"),
        (Spoiled(lambda _, score: score + torch.arange(10)[:, None]), "permuted outputs have other scores"),
    ],
)
def test_a_scorer_that_breaks_a_promise_is_told_which(scorer: Any, message: str | None) -> None:
    if message is None:
        check_scorer(scorer)  # all scores equal: a poor scorer, but one
        return
    with pytest.raises(AssertionError, match=message):
        check_scorer(scorer)


class Altered(Solver):
    """A solver that breaks one promise."""

    needs_score = True

    def __init__(self, alter: Callable[[Solution, Pattern], Solution]) -> None:
        self.alter = alter

    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        return self.alter(Zero().solve(weight, stats, pattern, score, allowed), pattern)


class Careless(Altered):
    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern, score: Any = None, allowed: Any = None) -> Any:
        return super().solve(weight, stats, pattern, score)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Zero, "is not a Solver"),
        (Altered(lambda found, _: Solution(found.weight.half(), found.keep)), "the weight comes out in torch.float16"),
        (Altered(lambda found, _: Solution(found.weight + 1, found.keep)), "pruned weights are not zero"),
        (Altered(lambda found, _: Solution(found.weight * 0, found.keep & False)), "the mask has other counts"),
        (Altered(lambda found, _: Solution(found.weight * 0, found.keep)), "a pattern that prunes nothing changes"),
        (Careless(lambda found, _: found), "weights that are not allowed are kept"),
    ],
)
def test_a_solver_that_breaks_a_promise_is_told_which(solver: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_solver(solver)


@dataclass(frozen=True)
class Skewed(Allocator):
    by: float = 0.01

    def allocate(self, layers: Any, target: float) -> dict[str, float]:
        found = Uniform().allocate(layers, target)
        return found | {layers[0].name: target + self.by}


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        (Uniform, "is not an Allocator"),
        (Skewed(), "the mean is"),
        (Skewed(1e-9), "the mean is"),
    ],
)
def test_an_allocator_that_breaks_a_promise_is_told_which(allocator: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_allocator(allocator)
