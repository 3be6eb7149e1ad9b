"""The contract of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from lit_prune.ops import LayerStats, Pattern
from lit_prune.ops.masks import Group


class Solution(NamedTuple):
    """A pruned weight and its mask."""

    weight: Tensor
    """``[o, i]`` in the dtype of the dense weight, exactly zero if pruned."""
    keep: Tensor
    """``[o, i]`` bool, True = kept."""


class Solver(ABC):
    """Choose the mask and repair the weights that stay."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What calibration must collect, of ``input_sq_norm``, ``gram`` and ``gradient``."""

    needs_score: ClassVar[bool] = False
    """Whether the solver cannot choose a mask of its own."""

    group: ClassVar[Group] = "matrix"
    """Which weights compete when neither the pattern nor a scorer says so."""

    takes_gram: ClassVar[bool] = False
    """Whether ``solve`` may overwrite a Gram matrix that is not read after it by its factor."""

    def draft(self) -> Solver:
        """Return a solver whose errors rank alike and that may be faster, to try what is thrown away again."""
        return self

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the floating-point operations of solving one layer, but for what layers with one input share."""
        return outputs * inputs

    def shared_flops(self, inputs: int) -> float:
        """Return the floating-point operations of factorising a Gram matrix ``[i, i]``."""
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
        """Prune one weight; the arguments are never changed, but for a Gram matrix as ``takes_gram`` says.

        Args:
            weight: ``[o, i]``, any floating dtype.
            stats: statistics of the layer's inputs, with at least what ``needs`` names.
            pattern: the sparsity asked; the solution has exactly that many zeros in the mask.
            score: ``[o, i]``, larger = keep: another method's opinion, which gives the mask.
            allowed: ``[o, i]`` bool: the weights that may be kept; None = any.

        Raises:
            InputError: if ``allowed`` leaves fewer weights than the pattern keeps.
        """
