from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.errors import InputError
from lit_prune.pruning import Cubic, Linear, OneShot, Step, Table


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


def test_linear_worked_example() -> None:
    # From 0.2 at step 0 to 0.6 at step 4: half-way is 0.4.
    schedule = Linear(start=0, end=4, every=2, initial=0.2)
    assert [schedule.sparsity(step, 0.6) for step in (0, 2, 4)] == pytest.approx([0.2, 0.4, 0.6])


def test_step_worked_example() -> None:
    # Three jumps to 0.6, ten steps apart: 0.2, 0.4, 0.6.
    schedule = Step(every=10, times=3, start=5)
    assert [step for step in range(50) if schedule.due(step)] == [5, 15, 25]
    assert [schedule.sparsity(step, 0.6) for step in (5, 15, 25)] == pytest.approx([0.2, 0.4, 0.6])
    assert schedule.sparsity(25, 0.7) == 0.7


def test_a_table_gives_what_it_says() -> None:
    schedule = Table({9: 0.7, 0: 0.3})
    assert [(step, schedule.sparsity(step, 0.7)) for step in range(20) if schedule.due(step)] == [(0, 0.3), (9, 0.7)]
    with pytest.raises(InputError, match=r"sparsities end at 0\.7: the plan's pattern asks for 0\.5"):
        schedule.sparsity(0, 0.5)


@pytest.mark.parametrize("ramp", [Cubic, Linear])
@given(
    start=st.integers(0, 50),
    length=st.integers(1, 200),
    every=st.integers(1, 60),
    initial=st.floats(0, 0.9),
    rise=st.floats(0, 1),
)
def test_a_ramp_rises_to_exactly_the_plans_sparsity(
    ramp: type[Cubic | Linear], start: int, length: int, every: int, initial: float, rise: float
) -> None:
    final = initial + rise * (0.99 - initial)
    schedule = ramp(start, start + length, every, initial)
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
    with pytest.raises(InputError, match="times is 0"):
        Step(every=5, times=0)
    with pytest.raises(InputError, match="sparsities is empty"):
        Table({})
    with pytest.raises(InputError, match=r"at step 3, sparsities is 1\.5"):
        Table({3: 1.5})
    with pytest.raises(InputError, match="step is -1"):
        OneShot(-1)
    with pytest.raises(InputError, match=r"initial is 0\.5: it is above"):
        Cubic(0, 5, 1, initial=0.5).sparsity(0, 0.3)
