"""Allocations by one threshold: LAMP and global magnitude."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.allocators import LAMP, Allocator, GlobalMagnitude
from lit_prune.allocators.base import Layer
from lit_prune.allocators.lamp import lamp_scores
from lit_prune.allocators.thresholds import quantiles
from lit_prune.errors import InputError, NumericalError


def layers(*weights: Tensor) -> list[Layer]:
    return [Layer(f"l{k}", k, (len(w), w.shape[1]), lambda w=w: w) for k, w in enumerate(weights)]  # type: ignore[misc]


def test_worked_example_of_global_magnitude() -> None:
    # Of the magnitudes 1 2 3 4 5 6 and 2.5 7 8 9 10 11, the lowest half are 1 2 2.5 3 4 5: five of the first layer and
    # one of the second one.
    first = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    second = torch.tensor([[-2.5, 7.0, 8.0], [9.0, 10.0, 11.0]])
    assert GlobalMagnitude().allocate(layers(first, second), 0.5) == pytest.approx({"l0": 5 / 6, "l1": 1 / 6})
    # At most half of each: the second layer takes what the first one cannot.
    found = GlobalMagnitude(max_sparsity=0.5).allocate(layers(first, second), 0.5)
    assert found == pytest.approx({"l0": 0.5, "l1": 0.5})
    # 4.5 of 12 weights: the threshold is at 3, the fourth, and half of the way to the next one, 4.
    assert GlobalMagnitude().allocate(layers(first, second), 4.5 / 12) == pytest.approx({"l0": 3.5 / 6, "l1": 1 / 6})


def test_worked_example_of_lamp() -> None:
    # Energies 1 1 2 4: each is divided by itself and those after it, 8 7 6 4.
    magnitudes = torch.tensor([1.0, 1.0, 2.0, 4.0]).sqrt()
    assert lamp_scores(magnitudes).tolist() == pytest.approx([1 / 8, 1 / 7, 1 / 3, 1])
    assert lamp_scores(torch.zeros(6)).tolist() == [0] * 6
    # The scale of a layer does not count: both layers get the same sparsity.
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert LAMP().allocate(layers(weight, 100 * weight), 0.6) == pytest.approx({"l0": 0.6, "l1": 0.6})


def test_many_scores_are_described_by_quantiles() -> None:
    scores = torch.rand(70_001, generator=torch.Generator().manual_seed(0)).sort().values
    kept = quantiles(scores)
    assert len(kept) == 1 << 14 and kept[-1] == scores.max() and (kept.diff() >= 0).all()
    for fraction in (0.1, 0.5, 0.9):  # a quantile is off by at most one of its steps
        at = torch.searchsorted(kept, scores.quantile(fraction)).item() / len(kept)
        assert at == pytest.approx(fraction, abs=1 / len(kept) + 1 / len(scores))


@given(st.integers(0, 2**16), st.floats(0.0, 0.98), st.sampled_from([LAMP, GlobalMagnitude]), st.booleans())
def test_the_budget_is_exact_whatever_the_weights(
    seed: int, target: float, allocator: type[Allocator], ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) * 4**k for k, shape in enumerate(((3, 8), (5, 2), (7, 7)))]
    weights = [weight.round() for weight in weights] if ties else weights
    found = allocator().allocate(layers(*weights), target)
    total = sum(weight.numel() for weight in weights)
    mean = sum(found[f"l{k}"] * weight.numel() for k, weight in enumerate(weights)) / total
    assert mean == pytest.approx(target, abs=1e-12)
    assert all(0 <= sparsity <= 0.99 for sparsity in found.values())


@pytest.mark.parametrize("allocator", [LAMP, GlobalMagnitude])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(allocator: type[Allocator], value: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 1] = value
    with pytest.raises(NumericalError, match="l1: the weight holds NaN or Inf"):
        allocator().allocate(layers(torch.ones(2, 3), weight), 0.5)


def test_a_budget_out_of_bounds_is_refused() -> None:
    with pytest.raises(InputError, match=r"no allocation with values in \[0, 0\.5\] has the mean 0\.6"):
        LAMP(max_sparsity=0.5).allocate(layers(torch.ones(2, 3)), 0.6)
    with pytest.raises(InputError, match=r"min_sparsity 0\.5 is above max_sparsity 0\.2"):
        GlobalMagnitude(min_sparsity=0.5, max_sparsity=0.2)
