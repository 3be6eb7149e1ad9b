"""Backward elimination of groups of columns from a least-squares problem, with repair of the remaining columns."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import NumericalError


def eliminate(
    weight: Tensor, inverse: Tensor, columns: Tensor, removed: int, steps: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Remove the groups of columns that the outputs ``X Wᵀ`` lose least by, and repair the others by least squares.

    The saliency of a group g is ``tr(W_g ([G⁻¹]_gg)⁻¹ W_gᵀ)``: the increase of the squared output error if it is
    removed and all remaining columns compensate for it (optimal brain surgeon; for one column,
    ``‖W_:j‖² / [G⁻¹]_jj``). The least salient ones are removed in ``steps``, and the saliencies are computed anew after
    each, because columns can stand in for each other.

    Example: W = [[1, 1, 1]] with the first two inputs equal up to noise: removing one of those costs almost nothing,
    because the other takes over its weight, W = [[0, 2, 1]]; after that, both others are salient.

    Args:
        weight: dense weight ``[o, i]``, float32 or float64; not modified.
        inverse: inverse ``G⁻¹`` ``[i, i]`` of the damped Gram matrix; overwritten.
        columns: columns of the groups ``[groups, columns per group]`` int64.
        removed: number of groups to remove.
        steps: number of steps in which to remove them; at least 1.
        allowed: groups that may be kept ``[groups]`` (bool); the others are removed first. None = all.

    Returns:
        The repaired weight ``[o, i]``, zero in removed columns, and the kept groups ``[groups]`` (bool).
    """
    work, kept = weight.clone(), torch.ones(len(columns), dtype=torch.bool, device=weight.device)
    steps = max(1, min(steps, removed))
    failed = torch.zeros((), dtype=torch.bool, device=weight.device)  # asked once: a GPU's host would wait every time
    for step in range(steps):
        count = removed * (step + 1) // steps - removed * step // steps
        saliency = _saliency(work, inverse, columns, kept, failed)
        if allowed is not None:
            saliency = saliency.masked_fill(~allowed, -1.0)
        saliency = saliency.masked_fill(~kept, float("inf"))
        chosen = saliency.topk(count, largest=False).indices
        kept[chosen] = False
        gone = columns[chosen].flatten()
        factor = _cholesky(inverse[gone][:, gone], failed)
        rows = inverse[gone]
        work -= torch.cholesky_solve(work[:, gone].T, factor).T @ rows
        inverse -= rows.T @ torch.cholesky_solve(rows, factor)
        work[:, gone] = 0.0
        inverse[gone] = 0.0
        inverse[:, gone] = 0.0
    if failed:
        raise NumericalError(
            f"a part of the inverse Gram matrix [{len(inverse)}, {len(inverse)}] is not positive definite: use a "
            "larger damping or more calibration tokens"
        )
    return work, kept


def _cholesky(matrices: Tensor, failed: Tensor) -> Tensor:
    """Return the Cholesky factors of matrices ``[..., c, c]``, and set ``failed`` if one is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    failed |= (info != 0).any()
    return factor


def _saliency(work: Tensor, inverse: Tensor, columns: Tensor, kept: Tensor, failed: Tensor) -> Tensor:
    """Return the saliency of every group ``[groups]``; of removed groups, whose columns are zero, any number."""
    if columns.shape[1] == 1:
        first = columns[:, 0]
        return work[:, first].square().sum(0) / inverse.diagonal()[first]
    local = inverse[columns[:, :, None], columns[:, None]]  # [groups, c, c]
    identity = torch.eye(columns.shape[1], dtype=local.dtype, device=local.device)
    factor = _cholesky(torch.where(kept[:, None, None], local, identity), failed)
    mine = work[:, columns].permute(1, 2, 0)  # [groups, c, o]
    return (torch.cholesky_solve(mine, factor) * mine).sum((1, 2))
