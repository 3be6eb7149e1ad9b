"""Factorisations of damped Gram matrices. A matrix that stays singular raises with the numbers; nothing falls back."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import InputError, NumericalError


def check_damping(damping: float) -> float:
    """Return ``damping`` (a fraction of the mean diagonal), or raise ``InputError`` where it is negative."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise InputError(f"damping is {damping!r}: it must be a number >= 0, such as 0.01")
    return float(damping)


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return a copy of ``gram`` ``[i, i]`` with ``damping * mean(diag)`` added to its diagonal.

    An input that was always zero (a dead input) gets 1 on its diagonal first, as in the SparseGPT reference: nothing is
    known about it, and its weights are free to go.
    """
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return matrix


def inverse_cholesky(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular ``U`` with ``UᵀU = (gram + damping * mean(diag) I)⁻¹``.

    One Cholesky factorisation and one triangular inverse: with ``J`` the reversal of rows, ``J G J = L Lᵀ`` gives
    ``G = R Rᵀ`` for the upper triangular ``R = J L J``, so ``U = R⁻¹``. No inverse of G is ever formed.

    Args:
        gram: ``XᵀX`` ``[i, i]``, float32 or float64, any scale.
        damping: fraction of the mean diagonal.

    Raises:
        NumericalError: where the damped matrix is not positive definite.
    """
    matrix = damped(gram, damping)
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if info.item() or not lower.diagonal().isfinite().all():
        diagonal = gram.diagonal()
        raise NumericalError(
            f"the Gram matrix [{gram.shape[0]}, {gram.shape[0]}] is not positive definite at damping {damping:g} "
            f"(diagonal from {diagonal.min().item():.3g} to {diagonal.max().item():.3g}): "
            "use more calibration tokens or a larger damping"
        )
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def relative_output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Return ``||X (W' - W)ᵀ||² / ||X Wᵀ||²`` from the Gram matrix ``XᵀX`` (0 for a layer without any output)."""
    dense = weight.to(gram.dtype)
    change = pruned.to(gram.dtype) - dense
    error = ((change @ gram) * change).sum(dtype=torch.float64)
    scale = ((dense @ gram) * dense).sum(dtype=torch.float64)
    return float(error / scale) if scale > 0 else 0.0
