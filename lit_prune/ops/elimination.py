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
    for step in range(steps):
        count = removed * (step + 1) // steps - removed * step // steps
        saliency = _saliency(work, inverse, columns)
        if allowed is not None:
            saliency = saliency.masked_fill(~allowed, -1.0)
        saliency = saliency.masked_fill(~kept, float("inf"))
        chosen = saliency.topk(count, largest=False).indices
        kept[chosen] = False
        gone = columns[chosen].flatten()
        factor = _cholesky(inverse[gone][:, gone])
        rows = inverse[gone]
        work -= torch.cholesky_solve(work[:, gone].T, factor).T @ rows
        inverse -= rows.T @ torch.cholesky_solve(rows, factor)
        work[:, gone] = 0.0
        inverse[gone] = 0.0
        inverse[:, gone] = 0.0
    return work, kept


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        raise NumericalError(
            f"a part [{len(matrix)}, {len(matrix)}] of the inverse Gram matrix is not positive definite: use a larger "
            "damping or more calibration tokens"
        )
    return factor


def _saliency(work: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """Return the saliency of every group ``[groups]``; of removed groups, whose columns are zero, any number."""
    if columns.shape[1] == 1:
        first = columns[:, 0]
        return work[:, first].square().sum(0) / inverse.diagonal()[first]
    found = []
    for group in columns:
        local = inverse[group][:, group]
        if not local.any():
            found.append(local.new_zeros(()))
            continue
        mine = work[:, group]
        found.append((torch.cholesky_solve(mine.T, _cholesky(local)).T * mine).sum())
    return torch.stack(found)
