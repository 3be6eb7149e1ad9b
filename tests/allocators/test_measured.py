import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.allocators import OWL, AlphaPruning, FromFile, Measured
from lit_prune.allocators.base import Layer, Trial
from lit_prune.allocators.measured import error_curve, minimise
from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured
from lit_prune.pruning import PruningPlan
from lit_prune.scorers import Magnitude

WEIGHT = torch.ones(2, 3)
STATS = LayerStats.from_inputs(torch.ones(2, 3))


def layer(block: int, evidence: object = None, name: str = "l", weight: torch.Tensor = WEIGHT) -> Layer:
    return Layer(f"{name}{block}", block, tuple(weight.shape), lambda: weight, evidence)  # type: ignore[arg-type]


def evidence(errors: dict[float, float], prior: object = None) -> dict[str, object]:
    return {"errors": errors, "prior": prior}


def exponentials(starts: Sequence[float], rate: float = 10.0) -> list[Layer]:
    """One layer per block, whose error is ``exp(start + rate * sparsity)``."""
    return [layer(b, evidence({s: exp(a + rate * s) for s in (0.4, 0.5, 0.6)})) for b, a in enumerate(starts)]


def tried(allocator: Measured, pattern: Pattern) -> tuple[list[float], object]:
    """Return the sparsities that the allocator tries, and what it observes."""
    asked: list[float] = []

    def output_error(trial: Pattern) -> Trial:
        assert type(trial) is type(pattern)
        asked.append(trial.sparsity)
        return Trial(trial.sparsity**2, round(trial.sparsity * WEIGHT.numel()))

    return asked, allocator.observe([layer(0)], [STATS], pattern, output_error)


def test_worked_example() -> None:
    # e_b(s) = exp(a_b + 10 s) at equal sizes: the sum is least where the slopes 10 e_b are equal, so where
    # s_0 - s_1 = (a_1 - a_0) / 10 = 0.1, around the mean of 0.5.
    assert Measured().allocate(exponentials([0.0, 1.0]), 0.5) == pytest.approx({"l0": 0.55, "l1": 0.45}, abs=2e-4)


def test_no_block_leaves_the_range_that_was_tried() -> None:
    # Five e-folds apart they would differ by 0.5, and end at the lowest and the highest trial.
    assert Measured().allocate(exponentials([0.0, 5.0]), 0.5) == pytest.approx({"l0": 0.6, "l1": 0.4})
    # Bounds of the allocator's own are narrower still.
    bounded = Measured(min_sparsity=0.45, max_sparsity=0.52)
    assert bounded.allocate(exponentials([0.0, 5.0]), 0.5) == pytest.approx({"l0": 0.52, "l1": 0.48})


def test_sizes_weigh_the_budget() -> None:
    # Three layers of one block against one of another, all equal in size: 3/4 s_0 + 1/4 s_1 = 0.5. The price of a
    # weight is equal where e_0 / 3 = e_1, so s_0 - s_1 = ln(3) / 10 = 0.10986.
    first, second = exponentials([0.0, 0.0])
    layers = [first, layer(0, first.evidence, "m"), layer(0, first.evidence, "n"), second]
    sparsity = Measured().allocate(layers, 0.5)
    assert sparsity["l0"] == sparsity["m0"] == sparsity["n0"] == pytest.approx(0.5 + 0.10986 / 4, abs=2e-4)
    assert sparsity["l1"] == pytest.approx(0.5 - 0.10986 * 3 / 4, abs=2e-4)


def test_trials_stand_around_the_target() -> None:
    asked, seen = tried(Measured(spread=0.1), Unstructured(0.5))
    assert asked == pytest.approx([0.4, 0.5, 0.6])
    assert seen == {"errors": {s: s**2 for s in asked}, "prior": None}
    assert tried(Measured(spread=0.1), Unstructured(0.9))[0] == pytest.approx([0.8, 0.9, 0.95])
    assert tried(Measured(spread=0.1), Unstructured(0.1))[0] == pytest.approx([0.05, 0.1, 0.2])
    assert tried(Measured(spread=0.1, max_sparsity=0.5), Unstructured(0.5))[0] == pytest.approx([0.4, 0.5])


def test_trials_of_nm_are_whole_levels_and_at_least_one_apart() -> None:
    assert tried(Measured(spread=0.1), NM(2, 4))[0] == [0.25, 0.5, 0.75]
    assert tried(Measured(spread=0.1), NM(4, 8))[0] == [0.375, 0.5, 0.625]
    assert tried(Measured(spread=0.25), NM(4, 8))[0] == [0.25, 0.5, 0.75]
    assert tried(Measured(spread=0.1), NM(1, 4))[0] == [0.5, 0.75]  # one of four is as sparse as it gets


def test_the_curve_meets_every_trial_and_never_falls() -> None:
    grid = torch.tensor([0.4, 0.45, 0.5, 0.55, 0.6], dtype=torch.float64)
    # Logarithms 0, 1, 4 lie on the parabola (s - 0.4) / 0.1 squared.
    curve = error_curve({0.4: 1.0, 0.5: exp(1), 0.6: exp(4)}, grid).log()
    torch.testing.assert_close(curve, torch.tensor([0.0, 0.25, 1.0, 2.25, 4.0], dtype=torch.float64))
    # Logarithms 0, 9, 10 would make it overshoot, and noise fall: neither happens.
    for errors in ([1.0, exp(9), exp(10)], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]):
        curve = error_curve(dict(zip((0.4, 0.5, 0.6), errors, strict=True)), grid)
        assert curve.isfinite().all() and (curve.diff() >= 0).all()
        assert curve[-1].item() == pytest.approx(max(*errors, 1e-12))


@given(st.lists(st.floats(-6, 2), min_size=2, max_size=6), st.floats(0.42, 0.58))
def test_no_exchange_between_two_blocks_lowers_the_sum(starts: list[float], target: float) -> None:
    layers = exponentials(starts)
    sparsity = list(Measured().allocate(layers, target).values())
    assert sum(sparsity) / len(sparsity) == pytest.approx(target, abs=1e-9)
    assert all(0.4 - 1e-9 <= s <= 0.6 + 1e-9 for s in sparsity)
    slopes = [exp(a + 10 * s) for a, s in zip(starts, sparsity, strict=True)]
    for gives, here in enumerate(sparsity):
        for takes, there in enumerate(sparsity):
            if here < 0.6 - 1e-3 and there > 0.4 + 1e-3:  # more of one and less of the other is allowed
                assert slopes[gives] >= slopes[takes] * (1 - 0.01)  # and no cheaper, to the grid's step


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6), st.floats(0.4, 0.6))
def test_any_errors_meet_the_budget_within_the_trials(errors: list[list[float]], target: float) -> None:
    layers = [layer(b, evidence(dict(zip((0.4, 0.5, 0.6), e, strict=True)))) for b, e in enumerate(errors)]
    sparsity = Measured().allocate(layers, target).values()
    assert sum(sparsity) / len(layers) == pytest.approx(target, abs=1e-9)
    assert all(0.4 - 1e-9 <= s <= 0.6 + 1e-9 for s in sparsity)


def test_equal_blocks_get_equal_sparsities_whatever_their_curve() -> None:
    for errors in ({0.4: 0.1, 0.5: 0.1, 0.6: 0.1}, {0.4: 0.1, 0.5: 0.3, 0.6: 0.31}, {0.4: 0.1, 0.5: 0.11, 0.6: 0.9}):
        sparsity = Measured().allocate([layer(b, evidence(errors)) for b in range(3)], 0.53)
        assert sparsity == pytest.approx({"l0": 0.53, "l1": 0.53, "l2": 0.53})


def test_a_jump_over_the_target_stops_on_it() -> None:
    # Straight lines of slopes 1 and 2: at every price below 1 both are at 0, between 1 and 2 the first is at 1.
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    chosen = minimise(torch.stack([grid, 2 * grid]), grid, shares, 0.25)
    torch.testing.assert_close(chosen, torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_a_prior_has_its_share(tmp_path: object) -> None:
    path = f"{tmp_path}/allocation.json"
    with open(path, "w") as file:
        json.dump({"l0": 0.3, "l1": 0.7}, file)
    layers, prior = exponentials([0.0, 1.0]), FromFile(path)
    # 0.55 and 0.45 as measured, 0.3 and 0.7 as the file says.
    for trust, first in ((1.0, 0.55), (0.5, 0.425), (0.2, 0.35), (0.0, 0.3)):
        sparsity = Measured(prior=prior, trust=trust).allocate(layers, 0.5)
        assert sparsity == pytest.approx({"l0": first, "l1": 1 - first}, abs=2e-4)


def test_a_prior_observes_and_measures_for_itself() -> None:
    allocator = Measured(prior=OWL(threshold=1.5))
    assert allocator.needs == {"output_error", "input_sq_norm"}
    _, seen = tried(allocator, Unstructured(0.5))
    assert seen["prior"] == 0.0  # type: ignore[index]
    layers = [
        replace(known, evidence={**known.evidence, "prior": 0.1 * k}) for k, known in enumerate(exponentials([0, 0]))
    ]
    assert Measured(prior=OWL(spread=0.1)).allocate(layers, 0.5) == pytest.approx({"l0": 0.55, "l1": 0.45})
    alpha = AlphaPruning("alpha_mid", windows=True)
    assert Measured(prior=alpha).metric_name == alpha.metric_name == "alpha_mid-windows"
    assert Measured().metric_name is None
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert Measured(prior=alpha).measure([layer(0, weight=weight)]) == alpha.measure([layer(0, weight=weight)])


def test_a_description_holds_the_priors_as_plain_data() -> None:
    plan = PruningPlan(Unstructured(0.5), Magnitude(), Measured(prior=AlphaPruning(epsilon=0.3)))
    described = plan.describe()["allocator"]
    prior = PruningPlan(Unstructured(0.5), Magnitude(), AlphaPruning(epsilon=0.3)).describe()["allocator"]
    assert described["init_args"]["prior"] == prior
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Measured(spread=0), "spread is 0"),
        (lambda: Measured(trust=1.5), r"trust is 1\.5"),
        (lambda: Measured(min_sparsity=0.6, max_sparsity=0.5), "above max_sparsity"),
        (lambda: Measured().allocate([layer(0)], 0.5), "got no output errors"),
        (lambda: Measured().allocate(exponentials([0.0]), 0.7), r"values in \[0\.4, 0\.6\] has the mean 0\.7"),
        (lambda: tried(Measured(max_sparsity=0.4), Unstructured(0.5)), r"values in \[0, 0\.4\] has the mean 0\.5"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
