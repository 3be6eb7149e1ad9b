from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.errors import InputError
from lit_prune.pruning import Cubic, OneShot


def test_one_shot_is_due_once() -> None:
    schedule = OneShot(step=3)
    assert [step for step in range(10) if schedule.due(step)] == [3]
    assert schedule.sparsity(3, 0.7) == 0.7
    assert schedule.last == 3


def test_cubic_worked_example() -> None:
    # From 0.2 at step 0 to 0.6 at step 4, half-way: 0.6 + (0.2 - 0.6) * (1/2)³ = 0.55.
    schedule = Cubic(start=0, end=4, every=2, initial=0.2)
    assert [step for step in range(10) if schedule.due(step)] == [0, 2, 4]
    assert [schedule.sparsity(step, 0.6) for step in (0, 2, 4)] == pytest.approx([0.2, 0.55, 0.6])


@given(
    start=st.integers(0, 50),
    length=st.integers(1, 200),
    every=st.integers(1, 60),
    initial=st.floats(0, 0.9),
    rise=st.floats(0, 1),
)
def test_cubic_rises_to_exactly_the_plans_sparsity(
    start: int, length: int, every: int, initial: float, rise: float
) -> None:
    final = initial + rise * (0.99 - initial)
    schedule = Cubic(start, start + length, every, initial)
    steps = [step for step in range(start + length + 100) if schedule.due(step)]
    values = [schedule.sparsity(step, final) for step in steps]
    assert (steps[0], steps[-1]) == (start, schedule.last)
    assert values[0] == pytest.approx(initial)
    assert values[-1] == final
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(InputError, match="end is 5: it must be after start, 5"):
        Cubic(5, 5, 1)
    with pytest.raises(InputError, match="every is 0"):
        Cubic(0, 5, 0)
    with pytest.raises(InputError, match="step is -1"):
        OneShot(-1)
    with pytest.raises(InputError, match=r"initial is 0\.5: it is above"):
        Cubic(0, 5, 1, initial=0.5).sparsity(0, 0.3)
