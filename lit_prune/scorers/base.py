"""The contract of a scorer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lit_prune.ops import LayerStats
from lit_prune.ops.masks import Group
from lit_prune.ops.stats import GradientNorm


class Scorer(ABC):
    """How much does each weight matter?"""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What calibration must collect, of ``input_sq_norm``, ``gram`` and ``gradient``."""

    group: ClassVar[Group] = "matrix"
    """Which weights the method is used to compare; a pattern's own ``group`` wins."""

    @property
    def gradient_norm(self) -> GradientNorm:
        """Which norm the gradient pass adds up, if ``needs`` names ``gradient``."""
        return "l2"

    @abstractmethod
    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return the importance of every weight.

        Args:
            weight: ``[o, i]``, any floating dtype; never changed.
            stats: statistics of the layer's inputs, with at least what ``needs`` names.

        Returns:
            ``[o, i]`` float32 (float64 for a float64 weight), larger = keep. Only the order within a group counts.
        """
