"""Zero: apply the mask without updating the kept weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import LayerStats, Pattern, select
from lit_prune.ops.masks import keep_only
from lit_prune.solvers.base import Solution, Solver


@final
@dataclass(frozen=True)
class Zero(Solver):
    """Zero the weights with the smallest scores and leave the others as they are, as Wanda and magnitude pruning do.

    .. code-block:: yaml

        scorer: {class_path: Wanda}
        solver: {class_path: Zero}
    """

    needs_score: ClassVar[bool] = True

    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        """Return ``weight * keep``; ``score`` ``[o, i]`` is required."""
        if score is None:
            raise InputError("the solver Zero got no score: name a scorer, such as Wanda")
        keep = select(score, pattern, allowed)
        return Solution(keep_only(weight.detach(), keep), keep)
