"""A plan as a value: what it accepts, and how it is written."""

from typing import Any

import pytest

from lit_prune.allocators import AlphaPruning, Measured
from lit_prune.errors import InputError
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction
from lit_prune.scorers import GBLM, Wanda
from lit_prune.solvers import ADMM, SparseGPT, Zero


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ("wanda", 0.5),
            r"plan\.pattern is 'wanda': it must be a Pattern, such as Unstructured\(0\.5\); a whole plan",
        ),
        ((0.5, Wanda()), r"plan\.pattern is 0\.5"),
        ((Unstructured(0.5), "wanda"), r"plan\.scorer is 'wanda': it must be a Scorer, such as Wanda\(\)"),
        ((Unstructured(0.5), Wanda), r"plan\.scorer is <class"),
        ((Unstructured(0.5), None, "alpha"), r"plan\.allocator is 'alpha': it must be a Allocator"),
        ((Unstructured(0.5), None, None, Wanda()), r"plan\.solver is Wanda\(\): it must be a Solver"),
    ],
)
def test_a_part_of_another_kind_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruningPlan(*parts)


def test_one_pattern_of_names_may_stand_alone() -> None:
    plan = PruningPlan(Unstructured(0.5), Wanda(), exclude="*.down_proj")
    assert plan == PruningPlan(Unstructured(0.5), Wanda(), exclude=["*.down_proj"])
    assert plan.exclude == ("*.down_proj",) and plan.include == ("*",)


@pytest.mark.parametrize(
    "plan",
    [
        PruningPlan(Unstructured(0.5, "row"), Wanda()),
        PruningPlan(NM(2, 4), solver=SparseGPT(), exclude=["*.down_proj"]),
        PruningPlan(Unstructured(0.7), GBLM(), Measured(prior=AlphaPruning(epsilon=0.3)), ADMM(mask="fixed")),
        PruningPlan(Unstructured(0.7), None, None, ADMM(), 0.3, Reconstruction(steps=3)),
    ],
    ids=lambda plan: type(plan.solver).__name__,
)
def test_a_plan_is_what_it_is_written_as(plan: PruningPlan) -> None:
    names = {cls.__name__: cls for cls in (PruningPlan, Unstructured, NM, Wanda, GBLM, Measured, AlphaPruning)}
    names |= {cls.__name__: cls for cls in (ADMM, SparseGPT, Zero, Reconstruction, type(plan.allocator))}
    assert eval(repr(plan), names) == plan
