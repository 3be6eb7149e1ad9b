import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.errors import NumericalError
from lit_prune.ops import spectrum
from support.rounding import gamma

DATA = Path(__file__).parents[1] / "data"
SHAPES = ("square", "wide", "tall")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "spectrum.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_worked_example() -> None:
    # The singular values of [[1, 0, 0], [0, 2, 0]] are 1 and 2, the eigenvalues 1 and 4. From the first up, Hill's
    # estimate is 1 + 2 / (ln 1 + ln 4); the fit says 0 and 1 - 4^(1 - alpha) = 1 - 1/e² where the data say 0 and 1/2.
    values = spectrum.eigenvalues(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert values.tolist() == pytest.approx([1, 4])
    fit = spectrum.alpha_full(values)
    assert fit.alpha == pytest.approx(1 + 2 / math.log(4))
    assert fit.distance == pytest.approx(1 - math.exp(-2) - 0.5)
    assert (fit.lambda_min, fit.tail) == (pytest.approx(1), 2)
    assert spectrum.stable_rank(values) == pytest.approx(5 / 4)
    assert (spectrum.norm(values), spectrum.spectral_norm(values)) == (pytest.approx(5), pytest.approx(4))
    # The fit of alpha_peak starts at the first eigenvalue, so its exponent is that of alpha_full.
    assert spectrum.log_alpha_norm(values) == pytest.approx(math.log10(1 + 4**fit.alpha))
    assert spectrum.entropy(values) == pytest.approx(-(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8)))


@pytest.mark.parametrize("index", range(3), ids=SHAPES)
@pytest.mark.parametrize("name", ["alpha_peak", "alpha_mid", "alpha_full"])
def test_fits_equal_the_reference(name: str, index: int, golden: dict[str, np.ndarray]) -> None:
    values = spectrum.eigenvalues(torch.from_numpy(golden[f"weight.{golden['order'][index]}"]))
    arguments = {"as_released": True} if name == "alpha_peak" else {}
    fit = getattr(spectrum, name)(values, **arguments)
    assert fit.alpha == pytest.approx(golden[name][index], abs=1e-3)
    assert fit.distance == pytest.approx(golden[f"{name}.ks"][index], abs=1e-3)


@pytest.mark.parametrize("index", range(3), ids=SHAPES)
def test_the_corrected_peak_equals_the_reference(index: int, golden: dict[str, np.ndarray]) -> None:
    values = spectrum.eigenvalues(torch.from_numpy(golden[f"weight.{golden['order'][index]}"]))
    assert spectrum.alpha_peak(values).alpha == pytest.approx(golden["alpha_peak.corrected"][index], abs=1e-3)


def power_law(alpha: float, count: int = 4000) -> Tensor:
    """Return the quantiles of a power law from 1 up."""
    return (1 - (torch.arange(count, dtype=torch.float64) + 0.5) / count) ** (1 / (1 - alpha))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.5])
def test_a_power_law_is_recovered(alpha: float) -> None:
    fit = spectrum.alpha_full(power_law(alpha))
    assert fit.alpha == pytest.approx(alpha, rel=0.02)
    assert fit.distance < 0.01


def check_eigenvalues(actual: Tensor, expected: Tensor, weight: Tensor) -> None:
    """Check those of ``WᵀW``, worked out in float64 in two ways: they are off by rounding of the largest (Weyl)."""
    bound = 2 * gamma(2 * sum(weight.shape)) * float(weight.double().square().sum())
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=bound)


@given(seed=st.integers(0, 1000), rows=st.integers(3, 20), columns=st.integers(3, 20), scale=st.floats(0.01, 100))
def test_the_exponent_depends_on_the_shape_of_the_spectrum_alone(
    seed: int, rows: int, columns: int, scale: float
) -> None:
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = spectrum.eigenvalues(weight)
    check_eigenvalues(spectrum.eigenvalues(weight.T), values, weight)
    check_eigenvalues(values, torch.linalg.svdvals(weight).square().flip(0), weight)
    plain, scaled = spectrum.alpha_full(values), spectrum.alpha_full(values * scale)
    # alpha is 1 + n / S, and each of the n logarithms in S is off by a few eps: alpha by (alpha - 1)² times as much.
    assert scaled.alpha == pytest.approx(plain.alpha, abs=2 * gamma(len(values) + 3) * plain.alpha**2)


def test_candidates_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = spectrum.eigenvalues(torch.randn(60, 90, generator=torch.Generator().manual_seed(0)))
    whole = spectrum.alpha_full(values)
    monkeypatch.setattr(spectrum, "_CHUNK", 200)
    assert spectrum.alpha_full(values) == whole


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (7, 40), (1, 5)])
def test_windows_are_square_and_cover_the_matrix(shape: tuple[int, int]) -> None:
    side = max(2, round(min(shape) * 0.5))
    for length in shape:
        starts = spectrum._window_starts(length, side)
        assert starts[0] == 0 and starts[-1] == max(0, length - side)
        assert all(b - a <= side / 2 + 1 for a, b in pairwise(starts))
    if min(shape) > 100:
        values = spectrum.windowed_eigenvalues(torch.randn(shape))
        assert len(values) >= 9 * side  # never one window alone
        assert (values.diff() >= 0).all()


def test_windows_take_the_aspect_ratio_away() -> None:
    generator = torch.Generator().manual_seed(0)
    square, long = torch.randn(200, 200, generator=generator), torch.randn(1600, 200, generator=generator)
    whole = [spectrum.alpha_mid(spectrum.eigenvalues(w)).alpha for w in (square, long)]
    pooled = [spectrum.alpha_mid(spectrum.windowed_eigenvalues(w)).alpha for w in (square, long)]
    assert abs(whole[0] - whole[1]) > 1
    assert abs(pooled[0] - pooled[1]) < 0.1


@pytest.mark.parametrize("metric", ["alpha_peak", "alpha_mid", "alpha_full"])
@pytest.mark.parametrize(
    "weight", [torch.ones(5, 4), torch.eye(4), torch.zeros(3, 4)], ids=["rank one", "flat spectrum", "all zero"]
)
def test_a_spectrum_without_a_tail_is_an_error(weight: Tensor, metric: str) -> None:
    with pytest.raises(NumericalError, match=r"no power law fits|all zero"):
        getattr(spectrum, metric)(spectrum.eigenvalues(weight))


def test_a_window_without_eigenvalues_falls_to_the_first_above_it() -> None:
    # The peak bin of log10 is the last, that of the largest value alone with its like; below it there is a wide gap.
    values = torch.tensor([1.0, 1e6, 1e6], dtype=torch.float64)
    with pytest.raises(NumericalError, match="no power law fits"):
        spectrum.alpha_peak(values)  # its tail is flat
    values = torch.tensor([1.0, 1e6, 1.001e6], dtype=torch.float64)
    assert spectrum.alpha_peak(values).tail == 2


def test_rounding_is_no_eigenvalue() -> None:
    weight = torch.randn(8, 3) @ torch.randn(3, 6)  # rank three
    assert len(spectrum.eigenvalues(weight.double())) == 3


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (300, 300), (129, 128), (1, 7)])
def test_a_gram_matrix_in_bands_has_the_eigenvalues_of_the_whole(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    check_eigenvalues(spectrum.eigenvalues(weight), expected, weight)


def test_nan_weights_are_an_error() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        spectrum.eigenvalues(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("name", spectrum.METRICS)
def test_metrics_are_finite_and_point_the_stated_way(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    light = torch.randn(64, 64, generator=generator)
    heavy = light + 60 * torch.randn(64, 1, generator=generator) @ torch.randn(1, 64, generator=generator) / 64
    metric = spectrum.METRICS[name]
    values = [metric(spectrum.eigenvalues(w)) for w in (heavy, light)]
    assert all(map(math.isfinite, values))
    if name in ("stable_rank", "entropy", "alpha_mid"):
        assert values[1] > values[0]  # the light tail calls for more
    if "norm" in name:
        assert values[1] < values[0]  # norms measure the scale, and call for less
