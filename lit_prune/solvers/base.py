"""Interface of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from lit_prune.ops import LayerStats, Pattern
from lit_prune.ops.masks import Group


class Solution(NamedTuple):
    """A pruned weight and its keep mask."""

    weight: Tensor
    """Pruned weight ``[o, i]`` in the dtype of the dense weight; pruned entries are exactly zero."""
    keep: Tensor
    """Keep mask ``[o, i]`` bool, True = kept."""


class Solver(ABC):
    """Base class of solvers, which choose the keep mask of a layer and update its kept weights."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics that calibration must collect: any of ``input_sq_norm``, ``gram`` and ``gradient``."""

    needs_score: ClassVar[bool] = False
    """Whether the solver requires a score, because it cannot choose a mask itself."""

    group: ClassVar[Group] = "matrix"
    """Default comparison group, if neither the pattern nor a scorer specifies one."""

    takes_gram: ClassVar[bool] = False
    """Whether ``solve`` may overwrite a Gram matrix with its factor if the matrix is not read afterwards."""

    def draft(self) -> Solver:
        """Return a possibly faster solver whose errors rank alike, for trial prunings that are discarded."""
        return self

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the floating-point operations to solve one layer, without those of ``shared_flops``."""
        return outputs * inputs

    def shared_flops(self, inputs: int) -> float:
        """Return the floating-point operations to factorise a Gram matrix ``[i, i]``, shared by layers of one input."""
        return 0.0

    @abstractmethod
    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        """Prune one weight; the arguments are not modified, except a Gram matrix if ``takes_gram`` is set.

        Args:
            weight: ``[o, i]``, any floating dtype.
            stats: statistics of the layer's inputs, including at least those named in ``needs``.
            pattern: pattern of the keep mask, which has exactly the pattern's number of zeros.
            score: ``[o, i]``, larger = keep: importance from a scorer, which determines the mask; None = no scorer.
            allowed: ``[o, i]`` bool, the weights that may be kept; None = any.

        Raises:
            InputError: if ``allowed`` leaves fewer weights than the pattern keeps.
        """
