"""ADMM: update the kept weights while the mask is being chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import NM, LayerStats, Pattern, Structured, Unstructured, select
from lit_prune.ops.linalg import check_damping, conjugate_gradient, inverse_plus
from lit_prune.ops.masks import check_allowed, drop_smallest, drop_smallest_each, keep_only, only
from lit_prune.ops.precision import working
from lit_prune.solvers.base import Solution, Solver

_RHO = (0.3, 0.7)
"""Penalty ρ of the first and the last stage of the continuation."""
_STAGES = 3
"""Number of stages of the continuation, each with one ρ and so one inverse."""
_DRAFT_ITERATIONS, _DRAFT_POLISH = 6, 2
"""Maximum number of iterations and of polish steps of a draft."""


@final
@dataclass(frozen=True)
class ADMM(Solver):
    """Alternating directions on the layer-wise problem: minimise ``||X (W' - W)ᵀ||²`` over all W' with the pattern.

    Boža, "Fast and Effective Weight Update for Pruned Large Language Models", 2024. With ``n = sqrt(diag XᵀX)``,
    ``H = XᵀX / (n nᵀ)`` (damped) and ``Ŵ = W n``, an iteration is ``Z = (W + U) M``, ``U += W - Z``,
    ``W = (H + ρI)⁻¹ (H Ŵ + ρ (Z - U))``, and the mask M is reselected from ``|W + U|``.

    By default ρ starts small and grows geometrically in three stages (``schedule: continuation``): while it is small,
    the weights move freely and the mask follows them; as it grows, they converge. The last ``polish`` iterations are
    conjugate-gradient steps on the kept weights, towards the least-squares solution for the final mask.

    ``schedule: cubic`` is the paper's gradual mask selection at ρ = 1: in the first three quarters of the iterations
    the sparsity rises as ``s (1 - (1 - k / n)³)``. ``as_released`` is the published code, which ignores that schedule
    for whole matrices. Both default to the paper's damping of 0.1 and to no polish.

    .. code-block:: yaml

        solver: {class_path: ADMM, init_args: {iterations: 12}}

    To repair the mask of a scorer instead of choosing one:

    .. code-block:: yaml

        scorer: {class_path: Wanda}
        solver: {class_path: ADMM, init_args: {mask: fixed}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    iterations: int | None = None
    """Total number of weight updates, including the polish; each costs one product ``[o, i] @ [i, i]``. null = 12 for
    the continuation and 20, as in the paper, for the others."""
    schedule: Literal["continuation", "cubic"] = "continuation"
    """Schedule of the mask selection: ``continuation`` in ρ, or the paper's ``cubic`` rise of the sparsity."""
    mask: Literal["gradual", "fixed"] = "gradual"
    """Mask selection: in every iteration (``gradual``), or once at the start (``fixed``), from the score, or from
    ``|Ŵ|`` without a scorer."""
    polish: int | None = None
    """Number of conjugate-gradient steps at the end; null = 2 for the continuation and none for the others."""
    damping: float | None = None
    """Damping added to the diagonal of H, as a fraction of the diagonal's mean; null = 0.003 for the continuation and
    0.1, as in the paper, for the others."""
    as_released: bool = False
    """Reproduce the published code, which ignores the cubic schedule for whole matrices."""
    rows_at_once: int | None = None
    """Number of rows of W to solve at once, to save memory; applies if the mask is chosen by row, as N:M, or fixed.
    null = all rows."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.schedule not in ("continuation", "cubic"):
            raise InputError(f"schedule is {self.schedule!r}: it must be 'continuation' or 'cubic'")
        if self.mask not in ("gradual", "fixed"):
            raise InputError(f"mask is {self.mask!r}: it must be 'gradual' or 'fixed'")
        last = self._iterations - 1
        if last < 0:
            raise InputError(f"iterations is {self.iterations!r}: it must be at least 1, such as 12, or null")
        if self.polish is not None and not 0 <= self.polish <= last:
            raise InputError(f"polish is {self.polish!r}: it must be from 0 to {last}, one less than iterations")
        if self.rows_at_once is not None and self.rows_at_once < 1:
            raise InputError(f"rows_at_once is {self.rows_at_once!r}: it must be at least 1, or null")
        check_damping(self._damping)

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the operations of the products, ``2 o i²`` each, and of the inverses, ``i³`` each."""
        updates = self._iterations - self._polish
        products = updates + (self._polish + 1 if self._polish else 0)
        return 2 * products * outputs * inputs**2 + len(set(self._penalties(updates))) * inputs**3

    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        """Choose the mask of ``weight`` ``[o, i]`` and update the kept weights; the dtype is preserved."""
        pattern.check(weight.shape)
        dense = working(weight)
        norm, gram = (part.to(dense) for part in stats.normalised(self._damping))
        dense = dense * norm
        check_allowed(allowed, pattern, weight.shape)
        start = None if score is None else select(score, pattern, allowed)
        if self.mask == "fixed" and start is None:
            start = select(dense.square() if isinstance(pattern, Structured) else dense.abs(), pattern, allowed)
        counts = None
        if isinstance(pattern, Unstructured) and pattern.group == "row":
            # Fix here which rows lose one more weight, so that rows can be solved independently.
            counts = (~pattern.mask(only(allowed, dense.abs()))).sum(1)
        size = self.rows_at_once if self.rows_at_once and self._splits(pattern) else len(dense)
        parts = [
            self._solve_rows(
                dense[rows],
                gram,
                partial(self._choose, pattern, None if counts is None else counts[rows]),
                None if start is None else start[rows],
                None if allowed is None else allowed[rows],
            )
            for rows in (slice(first, first + size) for first in range(0, len(dense), size))
        ]
        keep = torch.cat([part_keep for _, part_keep in parts])
        solved = torch.cat([part for part, _ in parts]) / norm
        if not solved.isfinite().all():
            raise NumericalError(f"ADMM diverged at damping {self._damping:g}: use a larger one")
        return Solution(keep_only(solved.to(weight.dtype), keep), keep)

    def draft(self) -> ADMM:
        """Return a solver with fewer iterations: the ranking of blocks by error stabilises long before the last one."""
        iterations = min(self._iterations, _DRAFT_ITERATIONS)
        return replace(self, iterations=iterations, polish=min(self._polish, _DRAFT_POLISH, iterations - 1))

    def _splits(self, pattern: Pattern) -> bool:
        """Return whether rows can be solved independently of each other."""
        if self.mask == "fixed" or getattr(pattern, "group", None) == "row":
            return True
        return isinstance(pattern, NM) and not self._published

    @property
    def _published(self) -> bool:
        return self.as_released or self.schedule == "cubic"

    @property
    def _iterations(self) -> int:
        default = 20 if self._published else 12
        return default if self.iterations is None else self.iterations

    @property
    def _polish(self) -> int:
        default = 0 if self._published else min(2, self._iterations - 1)
        return default if self.polish is None else self.polish

    @property
    def _damping(self) -> float:
        default = 0.1 if self._published else 0.003
        return default if self.damping is None else self.damping

    def _penalties(self, updates: int) -> list[float]:
        """Return the penalty ρ of every update."""
        if self._published:
            return [1.0] * updates
        stages = min(_STAGES, max(1, updates // 2))
        growth = (_RHO[1] / _RHO[0]) ** (1 / max(1, stages - 1))
        return [_RHO[0] * growth ** (step * stages // updates) for step in range(updates)]

    def _solve_rows(
        self,
        dense: Tensor,
        gram: Tensor,
        choose: Callable[[Tensor, Tensor, float], Tensor],
        start: Tensor | None,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the solution ``[rows, i]`` in units of ``Ŵ``, and its mask."""
        penalties = self._penalties(self._iterations - self._polish)
        current, dual, inverse = dense, torch.zeros_like(dense), gram
        keep = torch.ones_like(dense, dtype=torch.bool) if start is None else start
        for step, rho in enumerate(penalties):
            before = penalties[step - 1] if step else None
            if rho != before:
                inverse = inverse_plus(gram, rho)
                dual *= (before or rho) / rho
            free = current + dual
            if self.mask == "gradual" and not (step == 0 and start is not None):
                keep = choose(only(allowed, free.abs()), keep, (step + 1) / max(1, round(0.75 * len(penalties))))
            split = keep_only(free, keep)
            dual = free - split
            # (H + rho I)^-1 (H dense + rho (split - dual)), with H dense = (H + rho I) dense - rho dense
            current = torch.add(dense, split.sub_(dual).sub_(dense) @ inverse, alpha=rho)
        solved = keep_only(current + dual, keep)
        if self._polish:
            solved = conjugate_gradient(gram, dense, solved, keep, self._polish)
        return solved, keep

    def _choose(
        self, pattern: Pattern, counts: Tensor | None, magnitude: Tensor, keep: Tensor, progress: float
    ) -> Tensor:
        """Return the mask of an iteration.

        Args:
            pattern: its counts.
            counts: number of weights to remove from each row, if the pattern is by row; else None.
            magnitude: ``|W + U|``, ``[rows, i]``.
            keep: keep mask of the previous iteration.
            progress: progress of the paper's schedule in [0, 1]; 1 = full sparsity.
        """
        if isinstance(pattern, Structured):
            magnitude = magnitude.square()  # units are projected on by their norms
        reached = pattern.mask if counts is None else partial(drop_smallest_each, counts=counts)
        if not self._published:
            return reached(magnitude)
        if progress > 1:
            return keep
        by_matrix = isinstance(pattern, Unstructured) and counts is None
        if progress == 1 or (self.as_released and by_matrix):
            return reached(magnitude)
        sparsity = pattern.sparsity * (1 - (1 - progress) ** 3)
        if isinstance(pattern, Structured):
            return pattern.at(sparsity).mask(magnitude)
        if isinstance(pattern, NM):  # weights that N:M keeps are never pruned on the way
            magnitude = magnitude.masked_fill(pattern.mask(magnitude), float("inf"))
        groups = magnitude.reshape(1, -1) if counts is None else magnitude
        return drop_smallest(groups, int(sparsity * groups.shape[1])).reshape(magnitude.shape)
