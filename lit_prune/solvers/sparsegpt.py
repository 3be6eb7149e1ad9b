"""SparseGPT: prune column by column, and let the columns to the right make up for it."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured, select
from lit_prune.ops.linalg import check_damping
from lit_prune.ops.masks import check_allowed, drop_smallest_each, only
from lit_prune.ops.precision import working
from lit_prune.solvers.base import Solution, Solver

_COLUMNS_AT_ONCE = 16
"""Columns that are updated one by one; those to their right are made up for by a matrix product, which is faster."""


@final
class SparseGPT(Solver):
    """One optimal-brain-surgeon sweep over the columns (Frantar & Alistarh, "SparseGPT", 2023).

    ``U`` is the upper Cholesky factor of the inverse damped Gram matrix. Column ``j`` loses the weights with the least
    saliency ``(W_rj / U_jj)²``, and the error ``e = (W_j - W'_j) / U_jj`` is made good to its right:
    ``W[:, j:] -= e U[j, j:]``, at once within a block of columns and lazily beyond it.

    Unstructured masks are chosen when a block is reached, from all rows of the block (from each row's own weights with
    ``group: row``); N:M masks when the loop reaches each run of M columns. With a score, the mask is the one that the
    score gives, and the sweep repairs it. The prunings of the blocks add up to exactly the count asked.

    .. code-block:: yaml

        solver: {class_path: SparseGPT, init_args: {block_size: 128, damping: 0.01}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __init__(self, block_size: int = 128, damping: float = 0.01) -> None:
        """Validate and keep the arguments.

        Args:
            block_size: Columns per lazy update, and per choice of an unstructured mask.
            damping: Added to the diagonal of the Gram matrix, as a fraction of its mean.
        """
        if block_size < 1:
            raise InputError(f"block_size is {block_size!r}: it must be at least 1, such as 128")
        self.block_size = block_size
        self.damping = check_damping(damping)

    def flops(self, outputs: int, inputs: int) -> float:
        """Return those of the updates to the right: ``o i²``."""
        return outputs * inputs**2

    def shared_flops(self, inputs: int) -> float:
        """Return those of a Cholesky factorisation and a triangular inverse: ``2 i³ / 3``."""
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
        factor = stats.inverse_cholesky(self.damping).to(weight.device)
        work = working(weight).clone()
        work[:, (stats.gram.diagonal() == 0).to(work.device)] = 0.0  # dead inputs
        factor = factor.to(work.dtype)
        keep = torch.ones_like(work, dtype=torch.bool) if score is None else select(score, pattern, allowed)
        check_allowed(allowed, pattern, work.shape)
        allowed = torch.ones_like(keep) if allowed is None else allowed
        run = pattern.of if isinstance(pattern, NM) else 1
        width = -(-self.block_size // run) * run  # whole runs of N:M
        for start in range(0, work.shape[1], width):
            columns = slice(start, min(start + width, work.shape[1]))
            if score is None and isinstance(pattern, Unstructured):
                keep[:, columns] = _unstructured_mask(work, factor, columns, pattern, keep, allowed)
            errors = _sweep_block(work, factor, keep, columns, pattern if score is None else None, allowed)
            work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        return Solution(work.to(weight.dtype).masked_fill_(~keep, 0.0), keep)


def _unstructured_mask(
    work: Tensor, factor: Tensor, columns: slice, pattern: Unstructured, keep: Tensor, allowed: Tensor
) -> Tensor:
    """Choose a block's mask so that the counts of all blocks so far are ``round(sparsity * weights so far)``.

    Where weights that are not allowed are spread unevenly, a block gives up at least its own, and leaves as much of the
    count as the later blocks' are.
    """
    saliency = only(allowed[:, columns], (work[:, columns] / factor.diagonal()[columns]).square())
    groups = len(work) if pattern.group == "row" else 1
    competing = len(work) // groups  # rows that share one count

    def missing(mask: Tensor) -> Tensor:
        return (~mask).reshape(groups, -1).sum(1)

    pruned, later = missing(keep[:, : columns.start]), missing(allowed[:, columns.stop :])
    counts = round(pattern.sparsity * (competing * columns.stop)) - pruned
    most = round(pattern.sparsity * (competing * work.shape[1])) - pruned - later
    counts = counts.clamp_min(missing(allowed[:, columns])).minimum(most)
    return drop_smallest_each(saliency.reshape(groups, -1), counts).reshape(saliency.shape)


def _sweep_block(
    work: Tensor, factor: Tensor, keep: Tensor, columns: slice, choose: Pattern | None, allowed: Tensor
) -> Tensor:
    """Prune the columns of one block in place; return the errors ``[o, columns]`` for the columns beyond it."""
    block = work[:, columns].T.contiguous()  # [columns, o]: the loop reads and writes whole rows of memory
    pruned = ~keep[:, columns].T
    local = factor[columns, columns]
    scales = local.diagonal()[:, None]
    lost = pruned / scales  # times a weight it is that weight's error: 0 where the weight is kept
    errors = torch.empty_like(block)
    run = choose.of if isinstance(choose, NM) else 1
    step = -(-_COLUMNS_AT_ONCE // run) * run
    for first in range(0, len(block), step):
        few = slice(first, min(first + step, len(block)))
        for j in range(few.start, few.stop):
            if isinstance(choose, NM) and j % run == 0:
                those = slice(j, j + run)
                saliency = (block[those] / scales[those]).square().T
                pruned[those] = ~choose.mask(only(allowed[:, columns][:, those], saliency)).T
                lost[those] = pruned[those] / scales[those]
            error = torch.mul(block[j], lost[j], out=errors[j])
            block[j + 1 : few.stop].addr_(local[j, j + 1 : few.stop], error, alpha=-1)
        block[few.stop :].addmm_(local[few, few.stop :].T, errors[few], alpha=-1)
    work[:, columns] = block.masked_fill_(pruned, 0.0).T
    keep[:, columns] = ~pruned.T
    return errors.T
