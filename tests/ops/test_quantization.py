"""Grids of 8 and 4 bits, and rounding by coordinate descent."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.ops.quantization import CHUNK, Grid, Integers, round_by_descent

KINDS: tuple[Integers, ...] = ("int8", "int4")
KIND = st.sampled_from(KINDS)


def problem(outputs: int, inputs: int, sparsity: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a dense weight, a keep mask, the pruned weight and a Gram matrix, all float64."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(outputs, inputs, generator=generator) >= sparsity
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ (torch.eye(inputs) + mixed)
    return dense, keep, dense * keep, x.T @ x


def error(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    change = weight - dense
    return float(((change @ gram) * change).sum())


def nearest(weight: Tensor, kind: Integers, importance: Tensor | None = None) -> Tensor:
    grid = Grid.of(weight, kind, importance)
    return grid.levels(weight) * grid.steps(weight.shape[1]).to(weight)


def test_the_largest_value_is_on_the_lowest_level() -> None:
    #   (4  1  -3) = -0.5 * (-8  -2  6): exact, because the lowest of the levels -8 to 7 is one step further out.
    grid = Grid.of(torch.tensor([[4.0, 1.0, -3.0]]), "int4")
    assert grid.scales.tolist() == [[-0.5]] and grid.levels(torch.tensor([[4.0, 1.0, -3.0]])).tolist() == [[-8, -2, 6]]


def test_importance_decides_which_values_are_exact() -> None:
    # -8 and 0.2: with the scale 1, 0.2 becomes 0; a smaller scale clips -8 and gets closer to 0.2.
    weight = torch.tensor([[-8.0, 3.3]])
    plain, weighted = Grid.of(weight, "int4"), Grid.of(weight, "int4", torch.tensor([1e-6, 1.0]))
    close = [abs(float((grid.levels(weight) * grid.scales.float())[0, 1]) - 3.3) for grid in (plain, weighted)]
    assert close[1] < close[0]


def test_descent_makes_up_for_rounding() -> None:
    # The example of the docstring, on the grid of a third weight: steps of 1, because 8 is the largest value, and it
    # meets an input of its own. G = ((1 1 0) (1 1 0) (0 0 1)), W = (2.4 2.4 -8): to nearest (2 2 -8), whose outputs are
    # 4 in place of 4.8. First weight: 2 - (-0.8) / 1 = 2.8, so 3; second: 2 - 0.2 = 1.8, so 2. Error 0.04.
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1e9]])
    weight = torch.tensor([[2.4, 2.4, -8.0]])
    keep = torch.ones(1, 3, dtype=torch.bool)
    assert round_by_descent(weight, keep, weight, gram, "int4", 0).tolist() == [[2, 2, -8]]
    assert round_by_descent(weight, keep, weight, gram, "int4", 1).tolist() == [[3, 2, -8]]


def test_descent_makes_up_for_what_was_pruned() -> None:
    # W = (1 1) on equal inputs, the second is pruned: the first becomes 2, and nothing is lost.
    dense, keep = torch.tensor([[1.0, 1.0, -8.0]]), torch.tensor([[True, False, True]])
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1e9]])
    assert round_by_descent(dense * keep, keep, dense, gram, "int4", 1).tolist() == [[2, 0, -8]]


@given(st.integers(1, 5), st.integers(1, 150), st.floats(0, 1), KIND, st.integers(0, 99))
def test_a_weight_on_a_grid_gets_the_same_grid(
    outputs: int, inputs: int, sparsity: float, kind: Integers, seed: int
) -> None:
    dense, keep, weight, gram = problem(outputs, inputs, sparsity, seed)
    rounded = round_by_descent(weight, keep, dense, gram, kind, 2)
    assert torch.equal(nearest(rounded, kind), rounded)
    assert torch.equal(nearest(rounded.float(), kind).double(), rounded)  # a scale and a level take 15 bits


@given(st.integers(1, 5), st.integers(1, 150), st.floats(0, 0.9), KIND, st.integers(0, 99))
def test_every_pass_lowers_the_error_and_keeps_the_mask(
    outputs: int, inputs: int, sparsity: float, kind: Integers, seed: int
) -> None:
    dense, keep, weight, gram = problem(outputs, inputs, sparsity, seed)
    found = [round_by_descent(weight, keep, dense, gram, kind, passes) for passes in range(4)]
    assert torch.equal(found[0], nearest(weight, kind, gram.diagonal()))
    errors = [error(each, dense, gram) for each in found]
    # Each step is exact but for rounding in float64, relative to the terms that are summed.
    slack = 1e-12 * error(torch.zeros_like(dense), dense, gram)
    assert all(after <= before + slack for before, after in pairwise(errors))
    assert all(not each[~keep].any() for each in found)


@given(st.integers(1, 4), st.integers(1, 130), KIND, st.integers(0, 99))
def test_no_single_weight_has_a_better_level_at_the_end(outputs: int, inputs: int, kind: Integers, seed: int) -> None:
    dense, keep, weight, gram = problem(outputs, inputs, 0.5, seed)
    rounded = round_by_descent(weight, keep, dense, gram, kind, 60)
    step = Grid.of(weight, kind, gram.diagonal()).steps(inputs).double().abs()
    slope, curvature = (rounded - dense) @ gram, gram.diagonal()
    lowest, highest = {"int8": (-127, 127), "int4": (-8, 7)}[kind]
    level = rounded / Grid.of(weight, kind, gram.diagonal()).steps(inputs).double()
    for sign in (-1, 1):
        inside = (level + sign >= lowest) & (level + sign <= highest) & keep & (step > 0)
        scale = Grid.of(weight, kind, gram.diagonal()).steps(inputs).double()
        gain = 2 * sign * scale * slope + scale.square() * curvature  # the error's change by one step
        assert (gain[inside] >= -1e-9 * curvature.max() * step.max() ** 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_values_and_inputs_without_activations(kind: Integers) -> None:
    dense, keep, _, gram = problem(4, 2 * CHUNK + 3, 0.5, 0)
    keep[1] = False
    gram[5], gram[:, 5] = 0, 0
    rounded = round_by_descent(dense * keep, keep, dense, gram, kind, 3)
    assert rounded.isfinite().all() and not rounded[1].any()
    assert torch.equal(rounded[:, 5], round_by_descent(dense * keep, keep, dense, gram, kind, 0)[:, 5])


def test_rows_are_independent_and_bfloat16_keeps_the_grid() -> None:
    dense, keep, weight, gram = problem(6, 200, 0.5, 1)
    rounded = round_by_descent(weight, keep, dense, gram, "int4", 3)
    order = torch.randperm(6)
    again = round_by_descent(weight[order], keep[order], dense[order], gram, "int4", 3)
    assert torch.equal(again, rounded[order])
    # bfloat16 has 8 bits, so a product of a scale and a level is rounded, by up to 2^-9; so may the found scale be.
    found = nearest(rounded.bfloat16().double(), "int4")
    assert (found - rounded).norm() <= 2**-8 * rounded.norm()
