"""SparseGPT: prune column by column, and let the columns to the right make up for it."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured, select
from lit_prune.ops.linalg import check_damping
from lit_prune.ops.masks import drop_smallest
from lit_prune.ops.precision import working
from lit_prune.solvers.base import Solution, Solver


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

    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern, score: Tensor | None = None) -> Solution:
        """Sweep once over the columns of ``weight`` ``[o, i]``; the result is in the dtype of ``weight``."""
        pattern.check(weight.shape)
        factor = stats.inverse_cholesky(self.damping).to(weight.device)
        work = working(weight).clone()
        work[:, (stats.gram.diagonal() == 0).to(work.device)] = 0.0  # dead inputs
        factor = factor.to(work.dtype)
        keep = torch.ones_like(work, dtype=torch.bool) if score is None else select(score, pattern)
        run = pattern.of if isinstance(pattern, NM) else 1
        width = -(-self.block_size // run) * run  # whole runs of N:M
        for start in range(0, work.shape[1], width):
            columns = slice(start, min(start + width, work.shape[1]))
            if score is None and isinstance(pattern, Unstructured):
                keep[:, columns] = _unstructured_mask(work, factor, columns, pattern)
            errors = _sweep_block(work, factor, keep, columns, pattern if score is None else None)
            work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        return Solution(work.to(weight.dtype).masked_fill_(~keep, 0.0), keep)


def _unstructured_mask(work: Tensor, factor: Tensor, columns: slice, pattern: Unstructured) -> Tensor:
    """Choose a block's mask so that the counts of all blocks so far are ``round(sparsity * weights so far)``."""
    saliency = (work[:, columns] / factor.diagonal()[columns]).square()
    by_row = pattern.group == "row"
    competing = 1 if by_row else len(work)  # rows that share one count
    count = round(pattern.sparsity * (competing * columns.stop)) - round(pattern.sparsity * (competing * columns.start))
    groups = saliency if by_row else saliency.reshape(1, -1)
    return drop_smallest(groups, count).reshape(saliency.shape)


def _sweep_block(work: Tensor, factor: Tensor, keep: Tensor, columns: slice, choose: Pattern | None) -> Tensor:
    """Prune the columns of one block in place; return the errors ``[o, columns]`` for the columns beyond it."""
    block = work[:, columns].T.contiguous()  # [columns, o]: the loop reads and writes whole rows of memory
    pruned = ~keep[:, columns].T
    local = factor[columns, columns]
    errors = torch.empty_like(block)
    for j, scale in enumerate(local.diagonal().tolist()):
        if isinstance(choose, NM) and j % choose.of == 0:
            run = slice(j, j + choose.of)
            saliency = (block[run].T / local.diagonal()[run]).square()
            pruned[run] = ~choose.mask(saliency).T
        errors[j] = block[j].where(pruned[j], 0.0) / scale
        block[j].masked_fill_(pruned[j], 0.0)
        block[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
    work[:, columns] = block.T
    keep[:, columns] = ~pruned.T
    return errors.T
