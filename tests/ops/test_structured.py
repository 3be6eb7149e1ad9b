from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import Structured
from lit_prune.ops.elimination import eliminate
from lit_prune.testing import distance, stable

# A worked 2x3 example. Scores:
#     1 2 5
#     4 0 1
# The columns sum to 5, 2 and 6: a third is one column of three, the second. With the units {0, 1} and {2}, whose sums
# are 7 and 6, half is one unit of two, the last column.
SCORES = torch.tensor([[1.0, 2.0, 5.0], [4.0, 0.0, 1.0]])


def test_worked_example() -> None:
    assert Structured(1 / 3).mask(SCORES).tolist() == [[True, False, True]] * 2
    pairs = Structured(0.5).of_layer(torch.tensor([[0, 1], [2, 3]]), 1)
    assert pairs.mask(torch.cat([SCORES, torch.zeros(2, 1)], 1)).tolist() == [[True, True, False, False]] * 2


@given(units=st.integers(2, 9), width=st.integers(1, 4), removed=st.integers(0, 8), seed=st.integers(0, 99))
def test_exactly_the_units_go_in_any_order_of_the_columns(units: int, width: int, removed: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    removed = min(removed, units - 1)
    columns = torch.randperm(units * width, generator=generator).reshape(units, width)
    scores = torch.rand(3, units * width, generator=generator)
    keep = Structured(0.5).of_layer(columns, removed).mask(scores)
    kept = keep[0][columns]
    assert torch.equal(kept.all(1), kept.any(1))
    assert int((~kept.all(1)).sum()) == removed
    assert torch.equal(keep, keep[:1].expand_as(keep))
    sums = scores.sum(0)[columns].sum(1)
    assert not removed or sums[~kept.all(1)].max() <= sums[kept.all(1)].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1\.0"),
        ({"sparsity": 0.5, "units": ["rows"]}, r"units has 'rows': they are of channels, heads, blocks"),
        ({"sparsity": 0.5, "units": []}, r"units is \[\]"),
        ({"sparsity": 0.5, "units": ["heads", "heads"]}, "each once"),
        ({"sparsity": 0.5, "round_to": 0}, "round_to is 0"),
        ({"sparsity": 0.5, "round_to": 1.5}, r"round_to is 1\.5"),
        ({"sparsity": 0.5, "block_score": "size"}, "block_score is 'size'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Structured(**arguments)


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Return the best weight on some columns, from its normal equations."""
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(gram[kept][:, kept], (weight @ gram)[:, kept].T).T
    return best


def error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    change = weight - other
    return float(((change @ gram) * change).sum())


def problem(inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(5, inputs, generator=generator, dtype=torch.float64), x.T @ x


@given(seed=st.integers(0, 50), width=st.sampled_from([1, 2, 3]), removed=st.integers(1, 3), steps=st.integers(1, 4))
def test_the_rest_is_the_least_squares_solution(seed: int, width: int, removed: int, steps: int) -> None:
    weight, gram = problem(12, seed)
    columns = torch.arange(12).reshape(-1, width)
    solved, kept = eliminate(weight, torch.linalg.inv(gram), columns, removed, steps)
    assert int((~kept).sum()) == removed
    assert not solved[:, columns[~kept].flatten()].any()
    expected = least_squares(weight, gram, columns[kept].flatten())
    assert distance(solved, expected) <= 100 * stable(gram)


@given(seed=st.integers(0, 50), width=st.sampled_from([1, 2, 3]))
def test_the_first_unit_is_the_one_whose_loss_is_least(seed: int, width: int) -> None:
    weight, gram = problem(12, seed)
    columns = torch.arange(12).reshape(-1, width)
    _, kept = eliminate(weight, torch.linalg.inv(gram), columns, 1, 1)
    every = torch.arange(len(columns))
    losses = [error(weight, least_squares(weight, gram, columns[every != u].flatten()), gram) for u in every]
    assert int((~kept).nonzero()) == min(range(len(losses)), key=lambda unit: losses[unit])


def test_one_of_two_equal_columns_goes_and_the_other_takes_its_weight() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    weight = torch.ones(1, 3, dtype=torch.float64)
    solved, kept = eliminate(weight, torch.linalg.inv(x.T @ x), torch.arange(3)[:, None], 1, 1)
    assert kept[2] and int(kept.sum()) == 2
    assert solved[0, kept.nonzero()[0]].item() == pytest.approx(2, abs=1e-2)  # they differ by a thousandth


def test_a_singular_problem_is_an_error_of_its_own() -> None:
    weight, inverse = torch.ones(1, 3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)
    with pytest.raises(NumericalError, match="not positive definite: use a larger damping"):
        eliminate(weight, inverse, torch.arange(3)[:, None], 1, 1)


def test_units_that_are_not_allowed_go_first() -> None:
    weight, gram = problem(6, 0)
    allowed = torch.tensor([True, False, True, False, True, True])
    _, kept = eliminate(weight, torch.linalg.inv(gram), torch.arange(6)[:, None], 3, 2, allowed)
    assert not kept[~allowed].any() and int(kept.sum()) == 3
