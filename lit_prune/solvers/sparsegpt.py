"""SparseGPT: prune column by column, and update the columns to the right to compensate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Structured, Unstructured, select
from lit_prune.ops.elimination import eliminate
from lit_prune.ops.linalg import check_damping
from lit_prune.ops.masks import check_allowed, drop_smallest_each, keep_only, only
from lit_prune.ops.precision import working
from lit_prune.solvers.base import Solution, Solver

_COLUMNS_AT_ONCE = 16
"""Number of columns updated one by one; one matrix product then updates the columns to their right, which is faster."""


@final
@dataclass(frozen=True)
class SparseGPT(Solver):
    """One optimal-brain-surgeon sweep over the columns (Frantar & Alistarh, "SparseGPT", 2023).

    ``U`` is the upper Cholesky factor of the inverse damped Gram matrix. Column ``j`` loses the weights with the least
    saliency ``(W_rj / U_jj)²``, and the columns to its right compensate for the error ``e = (W_j - W'_j) / U_jj``:
    ``W[:, j:] -= e U[j, j:]``, immediately within a block of columns and lazily beyond it.

    Unstructured masks are chosen when the sweep reaches a block, over all rows of the block (per row with
    ``group: row``); N:M masks when it reaches each run of M columns. With a scorer, the mask is taken from the score,
    and the sweep only updates the kept weights. The numbers of weights pruned in the blocks sum exactly to the
    pattern's count.

    .. code-block:: yaml

        solver: {class_path: SparseGPT, init_args: {block_size: 128, damping: 0.01}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    takes_gram: ClassVar[bool] = True

    block_size: int = 128
    """Number of columns per lazy update, and per selection of an unstructured mask."""
    damping: float = 0.01
    """Damping added to the diagonal of the Gram matrix, as a fraction of the diagonal's mean."""
    steps: int = 64
    """Number of steps in which structured units are removed, each with new saliencies."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.block_size < 1:
            raise InputError(f"block_size is {self.block_size!r}: it must be at least 1, such as 128")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps!r}: it must be at least 1, such as 64")
        check_damping(self.damping)

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the operations of the column updates: ``o i²``."""
        return outputs * inputs**2

    def shared_flops(self, inputs: int) -> float:
        """Return the operations of a Cholesky factorisation and a triangular inverse: ``2 i³ / 3``."""
        return 2 * inputs**3 / 3

    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        """Sweep once over the columns of ``weight`` ``[o, i]``; the result is in the dtype of ``weight``."""
        pattern.check(weight.shape)
        check_allowed(allowed, pattern, weight.shape)
        if isinstance(pattern, Structured):
            return self._solve_units(weight, stats, pattern, score, allowed)
        work = working(weight.T.clone(memory_format=torch.contiguous_format))  # [i, o]: contiguous rows to sweep
        factor = stats.inverse_cholesky(self.damping, take_gram=True).to(work)
        work[(stats.input_sq_norm == 0).to(work.device)] = 0.0
        keep = torch.ones_like(work, dtype=torch.bool)
        if score is not None:
            keep = select(score, pattern, allowed).T.contiguous()
        allowed = None if allowed is None else allowed.T
        run = pattern.of if isinstance(pattern, NM) else 1
        width = -(-self.block_size // run) * run  # a multiple of M for N:M
        total = torch.tensor([round(pattern.sparsity * weight.numel())])
        if score is None and isinstance(pattern, Unstructured) and pattern.group == "row":
            saliency = only(allowed, (work / factor.diagonal()[:, None]).square())
            total = _missing(pattern.mask(saliency.T).T, pattern)
        pruned = torch.zeros_like(total)
        for start in range(0, len(work), width):
            columns = slice(start, min(start + width, len(work)))
            if score is None and isinstance(pattern, Unstructured):
                keep[columns] = _unstructured_mask(work, factor, columns, pattern, total, pruned, allowed)
                pruned = pruned + _missing(keep[columns], pattern)
            errors = _sweep_block(work, factor, keep, columns, pattern if score is None else None, allowed)
            work[columns.stop :].addmm_(factor[columns, columns.stop :].T, errors, alpha=-1)
        solved = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(work.T)
        del work  # large for a wide layer
        keep = keep.T.contiguous()
        return Solution(keep_only(solved, keep), keep)

    def _solve_units(
        self, weight: Tensor, stats: LayerStats, pattern: Structured, score: Tensor | None, allowed: Tensor | None
    ) -> Solution:
        """Remove whole units of columns by backward elimination, or those of the score, and repair the others."""
        columns = pattern.columns_of(weight.shape).to(weight.device)
        factor = stats.inverse_cholesky(self.damping).to(working(weight))
        inverse = factor.T @ factor
        work = working(weight)
        allowed_units = None if allowed is None else allowed.all(0)[columns].all(1)
        if score is not None:
            allowed_units = select(score, pattern, allowed)[0][columns].all(1)
        solved, kept = eliminate(work, inverse, columns, pattern.removed(len(columns)), self.steps, allowed_units)
        keep = pattern.mask_of(kept, weight.shape)
        return Solution(keep_only(solved.to(weight.dtype), keep), keep)


def _unstructured_mask(
    work: Tensor,
    factor: Tensor,
    columns: slice,
    pattern: Unstructured,
    total: Tensor,
    pruned: Tensor,
    allowed: Tensor | None,
) -> Tensor:
    """Return a block's keep mask ``[i, o]`` that brings the pruned fraction of all weights so far to the final one.

    If weights that are not allowed are distributed unevenly, a block prunes at least its own, and leaves enough of the
    count for those of the later blocks.

    Args:
        work: weights ``[i, o]``.
        factor: Cholesky factor ``[i, i]``.
        columns: columns of the weight, which are rows of ``work``.
        pattern: pattern with the comparison group.
        total: number of weights to prune in all blocks: per row of the weight, or one number.
        pruned: number of weights pruned in the previous blocks.
        allowed: weights ``[i, o]`` that may be kept; None = any.
    """
    counts = (total.double() * columns.stop / len(work)).round().long() - pruned
    saliency = (work[columns] / factor.diagonal()[columns, None]).square()
    if allowed is not None:
        saliency = only(allowed[columns], saliency)
        most = total - pruned - _missing(allowed[columns.stop :], pattern)
        counts = counts.clamp_min(_missing(allowed[columns], pattern)).minimum(most)
    by_row = pattern.group == "row"
    compared = saliency.T.contiguous() if by_row else saliency.reshape(1, -1)
    mask = drop_smallest_each(compared, counts)
    return mask.T if by_row else mask.reshape(saliency.shape)


def _missing(mask: Tensor, pattern: Unstructured) -> Tensor:
    """Return the number of weights that a mask ``[i, o]`` prunes, per row of the weight or in total, in CPU memory."""
    removed = mask.shape[0] - mask.sum(0) if pattern.group == "row" else (mask.numel() - mask.sum()).reshape(1)
    return removed.cpu()


def _sweep_block(
    work: Tensor, factor: Tensor, keep: Tensor, columns: slice, choose: Pattern | None, allowed: Tensor | None
) -> Tensor:
    """Prune the columns of one block in place, all tensors ``[i, o]``; return the errors to propagate beyond it."""
    block, pruned, local = work[columns], ~keep[columns], factor[columns, columns]
    scales = local.diagonal()[:, None]
    lost = pruned / scales  # times a weight, this is that weight's error: 0 if the weight is kept
    errors = torch.empty_like(block)
    run = choose.of if isinstance(choose, NM) else 1
    step = -(-_COLUMNS_AT_ONCE // run) * run
    weights, factors, results = block.unbind(), lost.unbind(), errors.unbind()
    for first in range(0, len(block), step):
        few = slice(first, min(first + step, len(block)))
        for j in range(few.start, few.stop):
            if isinstance(choose, NM) and j % run == 0:
                those = slice(j, j + run)
                saliency = (block[those] / scales[those]).square()
                may = None if allowed is None else allowed[columns][those].T
                pruned[those] = ~choose.mask(only(may, saliency.T)).T
                lost[those] = pruned[those] / scales[those]
            torch.mul(weights[j], factors[j], out=results[j])
            block[j + 1 : few.stop].addr_(local[j, j + 1 : few.stop], results[j], alpha=-1)
        block[few.stop :].addmm_(local[few, few.stop :].T, errors[few], alpha=-1)
    torch.logical_not(pruned, out=keep[columns])
    return errors
