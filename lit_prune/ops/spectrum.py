"""Eigenvalue spectrum (ESD) of a weight, and metrics of its shape.

A heavy tail, that is, a small alpha, indicates a well-trained layer, which AlphaPruning prunes less.
Martin & Mahoney, "Implicit Self-Regularization in Deep Neural Networks", 2021; Lu et al., "AlphaPruning", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prune.errors import NumericalError
from lit_prune.ops.linalg import add_upper_gram

_BINS = 100
_CHUNK = 1 << 22
"""Maximum product of the numbers of candidates and eigenvalues to process at once."""


class PowerLaw(NamedTuple):
    """A power law ``p(λ) ~ λ^-alpha`` fitted to the eigenvalues of at least ``lambda_min``."""

    alpha: float
    """Exponent, by Hill's estimator ``1 + n / Σ ln(λ_i / λ_min)``."""
    lambda_min: float
    """Smallest eigenvalue of the tail."""
    distance: float
    """Kolmogorov-Smirnov distance between the tail and the fit."""
    tail: int
    """Number of eigenvalues in the tail."""


def eigenvalues(weight: Tensor) -> Tensor:
    """Return the eigenvalues of ``WᵀW`` or, if smaller, ``WWᵀ``: ``[min(o, i)]`` float64 on the CPU, ascending.

    Squaring a matrix halves the number of accurate digits of its small singular values, so the product is computed in
    float64. Values that are zero up to rounding are omitted.

    Raises:
        NumericalError: if the weight is zero, or not finite.
    """
    matrix = weight.detach().double()
    rows = matrix.T if len(matrix) <= matrix.shape[1] else matrix
    gram = add_upper_gram(rows.new_zeros(rows.shape[1], rows.shape[1]), rows)
    if not gram.diagonal().isfinite().all():  # the diagonal bounds all other entries
        raise NumericalError(f"the weight [{weight.shape[0]}, {weight.shape[1]}] holds NaN or Inf")
    values = torch.linalg.eigvalsh(gram, UPLO="U").cpu()  # LAPACK is slower with the lower triangle
    values = values[values > values[-1] * len(values) * torch.finfo(values.dtype).eps]
    if not len(values):
        raise NumericalError(f"the weight [{weight.shape[0]}, {weight.shape[1]}] is all zero: it has no spectrum")
    return values


def windowed_eigenvalues(weight: Tensor, fraction: float = 0.5) -> Tensor:
    """Return the pooled eigenvalues of square windows of the weight, ascending.

    The aspect ratio of a matrix biases its spectrum regardless of training; windows of one shape remove that bias
    (FARMS, Hu et al., "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias", 2025). The side of a
    window is ``fraction`` times the matrix's shorter side, and windows overlap by half or slightly more.
    """
    side = max(2, round(min(weight.shape) * fraction))
    rows, columns = (_window_starts(length, side) for length in weight.shape)
    windows = [weight[r : r + side, c : c + side] for r in rows for c in columns]
    return torch.cat([eigenvalues(window) for window in windows]).sort().values


def _window_starts(length: int, side: int) -> list[int]:
    """Return evenly spaced starts of windows that cover ``length`` and overlap by at least half."""
    if length <= side:
        return [0]
    count = -(-2 * (length - side) // side) + 1
    return [round(k * (length - side) / (count - 1)) for k in range(count)]


def fit_power_law(values: Tensor, candidates: Tensor) -> PowerLaw:
    """Fit the tail that starts at each candidate, and return the fit with the smallest Kolmogorov-Smirnov distance.

    The distance is ``max_k |1 - (λ_k / λ_min)^(1 - alpha) - k / n|`` over the tail's ``n`` eigenvalues, k = 0 … n - 1.

    Args:
        values: eigenvalues, ascending and positive.
        candidates: ascending indices of possible ``λ_min``.

    Raises:
        NumericalError: if no candidate has a tail of distinct values, as in a flat spectrum.
    """
    logs = values.double().log()
    total = len(logs)
    tails = total - candidates
    sums = logs.flip(0).cumsum(0).flip(0)[candidates] - tails * logs[candidates]
    fits = sums > tails * 1e-12  # the exponent of a flat tail is undefined
    candidates, tails, sums = candidates[fits], tails[fits], sums[fits]
    if not len(candidates):
        raise _no_tail(total)
    alphas = 1 + tails / sums
    distances = torch.cat(
        [
            _distances(logs, part, alphas[part_index])
            for part, part_index in _chunks(candidates, max(1, _CHUNK // total))
        ]
    )
    best = int(distances.argmin())
    return PowerLaw(
        alphas[best].item(), values[candidates[best]].item(), distances[best].item(), int(tails[best].item())
    )


def _no_tail(count: int) -> NumericalError:
    return NumericalError(f"no power law fits a spectrum of {count} eigenvalues, all alike or only one")


def _chunks(candidates: Tensor, size: int) -> list[tuple[Tensor, slice]]:
    return [(candidates[start : start + size], slice(start, start + size)) for start in range(0, len(candidates), size)]


def _distances(logs: Tensor, candidates: Tensor, alphas: Tensor) -> Tensor:
    """Return the Kolmogorov-Smirnov distance ``[c]`` of each candidate."""
    index = torch.arange(len(logs), device=logs.device)
    first = int(candidates[0])
    rank = (index[first:] - candidates[:, None]) / (len(logs) - candidates[:, None])
    model = 1 - ((1 - alphas[:, None]) * (logs[first:] - logs[candidates, None])).exp()
    return torch.where(rank >= 0, (model - rank).abs(), 0.0).amax(1)


def alpha_peak(values: Tensor, as_released: bool = False) -> PowerLaw:
    """Fit with ``λ_min`` near the peak of the histogram of ``log10 λ`` (100 bins): 0.95 to 1.5 times its left edge.

    If no eigenvalue other than the largest is in that window, the first one at or above the peak's edge is the
    candidate. ``as_released`` uses the published code's lower bound, which is the logarithm of the window's edge.
    """
    logs = values.log10().float()  # the reference's histogram is in float32
    if logs[0] == logs[-1]:
        raise _no_tail(len(values))
    counts = torch.histc(logs, _BINS)
    left = torch.linspace(logs[0].item(), logs[-1].item(), _BINS + 1)[int(counts.argmax())].item()
    low = 0.95 * 10**left
    low = math.log10(low) if as_released else low
    inside = (values > low) & (values < 1.5 * 10**left)
    inside[-1] = False  # the exponent of a single-value tail is undefined
    if not inside.any():
        inside[int(torch.searchsorted(values, 10**left).clamp(max=len(values) - 2))] = True
    return fit_power_law(values, inside.nonzero().flatten())


def alpha_mid(values: Tensor) -> PowerLaw:
    """Fit with ``λ_min`` at the median: ascending index ``⌊N/2⌋``."""
    return fit_power_law(values, torch.tensor([len(values) // 2]))


def alpha_full(values: Tensor) -> PowerLaw:
    """Fit with every eigenvalue except the largest as a candidate."""
    return fit_power_law(values, torch.arange(len(values) - 1))


def norm(values: Tensor) -> float:
    """Return ``Σ λ``, the squared Frobenius norm of the weight; "norm" of WeightWatcher."""
    return values.sum().item()


def spectral_norm(values: Tensor) -> float:
    """Return ``λ_max``, the square of the largest singular value; "spectral norm" of WeightWatcher."""
    return values[-1].item()


def log_alpha_norm(values: Tensor) -> float:
    """Return ``log10 Σ λ^α`` with the exponent of ``alpha_peak``, the logarithm of the α-Schatten norm."""
    return (torch.logsumexp(alpha_peak(values).alpha * values.log(), 0) / math.log(10)).item()


def stable_rank(values: Tensor) -> float:
    """Return ``Σ λ / λ_max``, the effective number of directions with about the largest singular value."""
    return (values.sum() / values[-1]).item()


def entropy(values: Tensor) -> float:
    """Return the Shannon entropy of ``λ / Σ λ``, as a fraction of the entropy of a flat spectrum."""
    if len(values) == 1:
        return 0.0
    shares = values / values.sum()
    return (-(shares * shares.log()).sum() / torch.tensor(float(len(values))).log()).item()


METRICS: dict[str, Callable[[Tensor], float]] = {
    "alpha_peak": lambda values: alpha_peak(values).alpha,
    "alpha_peak_as_released": lambda values: alpha_peak(values, as_released=True).alpha,
    "alpha_mid": lambda values: alpha_mid(values).alpha,
    "alpha_full": lambda values: alpha_full(values).alpha,
    "alpha_hat": lambda values: alpha_peak(values).alpha * values[-1].log10().item(),
    "stable_rank": stable_rank,
    "entropy": entropy,
    "norm": norm,
    "log_norm": lambda values: math.log10(norm(values)),
    "spectral_norm": spectral_norm,
    "log_alpha_norm": log_alpha_norm,
}
"""Metrics of ascending eigenvalues, by name; AlphaPruning maps a larger one to a higher sparsity.

The norms measure the scale of a spectrum, as WeightWatcher defines them, and the others its shape.
"""
