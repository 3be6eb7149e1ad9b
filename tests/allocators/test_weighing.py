"""The choice between kinds of units, at one price for all of them."""

from itertools import product
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.allocators.weighing import Choices, Curve, error_between, error_of, saved, weigh
from lit_prune.errors import InputError


def curve(cost: list[float], errors: list[float]) -> Curve:
    return Curve("channels", torch.tensor(cost, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64))


def test_worked_example() -> None:
    # Two curves that save 0, 1 or 2. The levels of the first cost 1 and 3 - 1 = 2 each, those of the second 3 and 4.
    blocks = [Choices((curve([0, 1, 2], [0, 1, 3]),)), Choices((curve([0, 1, 2], [0, 3, 7]),))]
    assert weigh(blocks, 1) == [[1], [0]]
    assert weigh(blocks, 2) == [[2], [0]]
    assert weigh(blocks, 3) == [[2], [1]]
    assert weigh(blocks, 4) == [[2], [2]]
    # Two curves of one block are weighed alike.
    assert weigh([Choices((blocks[0].curves[0], blocks[1].curves[0]))], 3) == [[2, 1]]


def test_a_unit_that_saves_more_may_cost_more() -> None:
    # A head that saves 3 for an error of 2 is cheaper than three channels that cost 1 each, once 3 have to go.
    channels, head = curve([0, 1, 2, 3], [0, 1, 2, 3]), curve([0, 3], [0, 2])
    assert weigh([Choices((channels, head))], 3) == [[0, 1]]
    assert weigh([Choices((channels, head))], 4) == [[1, 1]]
    assert weigh([Choices((channels, head))], 2) == [[2, 0]]  # the head would be one too many, and two are exact


def test_a_coarse_unit_goes_where_fine_ones_do_not_suffice() -> None:
    # Three channels at most, and a head of 4: 5 are the head and one channel, however dear the head is.
    channels, head = curve([0, 1, 2, 3], [0, 1, 2, 3]), curve([0, 4], [0, 100])
    assert weigh([Choices((channels, head))], 5) == [[1, 1]]
    # The block saves 9: 8 are all units and one that is missing, or the block and one too many.
    assert weigh([Choices((channels, head), cost=9, error=200.0)], 7) == [[3, 1]]
    assert weigh([Choices((channels, head), cost=9, error=200.0), Choices((channels,))], 11) == [None, [2]]


def test_a_block_goes_where_that_is_cheapest() -> None:
    units = curve([0, 1, 2, 3], [0, 1, 2, 4])
    blocks = [Choices((units,), cost=4, error=2.0), Choices((units,), cost=4, error=9.0)]
    assert weigh(blocks, 4) == [None, [0]]
    assert weigh(blocks, 5) == [None, [1]]
    assert weigh(blocks, 2) in ([[1], [1]], [[2], [0]], [[0], [2]])
    equal = [Choices((units,), cost=4, error=2.0)] * 3
    assert sorted(map(str, weigh(equal, 4))) == ["None", "[0]", "[0]"] or weigh(equal, 4)[0] is None


def test_what_cannot_be_saved_is_refused() -> None:
    blocks = [Choices((curve([0, 1, 2], [0, 1, 3]),), cost=4)]
    with pytest.raises(InputError, match="at most 50% of what should be removed"):
        weigh(blocks, 4)


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """Return a block whose units save whole numbers, with one or two curves of any shape."""
    curves = []
    for width in draw(st.lists(st.sampled_from([1, 1, 3]), min_size=1, max_size=2)):
        rises = draw(st.lists(st.floats(0.01, 5), min_size=1, max_size=4))
        errors = torch.tensor([0.0, *rises], dtype=torch.float64).cumsum(0)
        curves.append(Curve("heads", torch.arange(len(errors), dtype=torch.float64) * width, errors))
    cost = sum(float(c.cost[-1]) for c in curves) + 2
    return Choices(tuple(curves), cost, draw(st.one_of(st.just(inf), st.floats(0.01, 9))))


@given(st.lists(choices(), min_size=1, max_size=4), st.floats(0, 1))
def test_the_budget_is_met_to_half_a_unit_if_channels_can_fill_it_up(blocks: list[Choices], part: float) -> None:
    # Every block also has many channels that save 1 each, as MLPs have.
    rises = torch.arange(0, 40, dtype=torch.float64)
    fine = Curve("channels", rises, rises**2 / 10)
    blocks = [Choices((*b.curves, fine), b.cost + 39, b.error) for b in blocks]
    budget = round(part * sum(float(c.cost[-1]) for b in blocks for c in b.curves))
    chosen = weigh(blocks, budget)
    assert saved(blocks, chosen) == budget


def convex(draw_rises: list[float]) -> Curve:
    rises = torch.tensor(sorted(draw_rises), dtype=torch.float64)
    errors = torch.cat([torch.zeros(1, dtype=torch.float64), rises.cumsum(0)])
    return Curve("channels", torch.arange(len(errors), dtype=torch.float64), errors)


@given(st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_no_other_choice_is_better_where_errors_rise_ever_faster(rises: list[list[float]], data: st.DataObject) -> None:
    blocks = [Choices((convex(each),)) for each in rises]
    budget = data.draw(st.integers(0, sum(map(len, rises))))
    chosen = weigh(blocks, budget)
    assert saved(blocks, chosen) == budget
    every = product(*(range(len(each) + 1) for each in rises))
    best = min(error_of(blocks, [[k] for k in levels]) for levels in every if sum(levels) == budget)
    assert error_of(blocks, chosen) == pytest.approx(best, abs=1e-9)


@given(st.lists(choices(), min_size=2, max_size=4), st.floats(0.05, 0.9), st.randoms())
def test_the_order_of_the_blocks_does_not_matter(blocks: list[Choices], part: float, random: object) -> None:
    budget = part * sum(float(c.cost[-1]) for b in blocks for c in b.curves)
    order = list(range(len(blocks)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = [blocks[i] for i in order]
    before, after = weigh(blocks, budget), weigh(shuffled, budget)
    assert saved(shuffled, after) == pytest.approx(saved(blocks, before))
    assert error_of(shuffled, after) == pytest.approx(error_of(blocks, before))


def test_powers_between_trials() -> None:
    # Errors of 1 and 4 at 0.1 and 0.2 are 100 s^2; from 0.2 to 0.4, 16 / 4 is again a power of two.
    at = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = error_between({0.2: 4.0, 0.1: 1.0, 0.4: 16.0}, at)
    torch.testing.assert_close(found, 100 * at**2)
    torch.testing.assert_close(
        error_between({0.5: 2.0}, torch.tensor([0.0, 0.25, 0.5]).double()), torch.tensor([0.0, 1.0, 2.0]).double()
    )


@given(st.lists(st.floats(0, 10), min_size=1, max_size=4))
def test_the_curve_starts_at_zero_never_falls_and_ends_at_the_worst_trial(errors: list[float]) -> None:
    tried = {0.1 * (k + 1): error for k, error in enumerate(errors)}
    grid = torch.linspace(0, max(tried), 50, dtype=torch.float64)
    found = error_between(tried, grid)
    assert found[0] == 0 and found.isfinite().all() and (found.diff() >= 0).all()
    assert float(found[-1]) == pytest.approx(max(*errors, 1e-12), rel=1e-6)
