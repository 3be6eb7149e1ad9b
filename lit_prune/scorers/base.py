"""The contract of a scorer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lit_prune.ops import LayerStats, Pattern
from lit_prune.ops.masks import Group
from lit_prune.ops.stats import GradientNorm


class Scorer(ABC):
    """Base class of scorers, which assign an importance to every weight of a layer."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics that calibration must collect: any of ``input_sq_norm``, ``gram`` and ``gradient``."""

    group: ClassVar[Group] = "matrix"
    """Default comparison group of the method; a pattern's own ``group`` takes precedence."""

    @property
    def gradient_norm(self) -> GradientNorm:
        """Norm over samples that the gradient pass accumulates; only read if ``needs`` contains ``gradient``."""
        return "l2"

    @abstractmethod
    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return the importance of every weight.

        Args:
            weight: ``[o, i]``, any floating dtype; not modified.
            stats: statistics of the layer's inputs, including at least those named in ``needs``.

        Returns:
            ``[o, i]`` float32 (float64 for a float64 weight), larger = keep. Only the order within a group matters.
        """

    def diagnose(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> dict[str, float]:
        """Return fractions that describe how the method works on a layer, by name; they are kept in the report.

        Args:
            weight: ``[o, i]``, as for ``score``.
            stats: statistics of the layer's inputs.
            pattern: pattern of the layer's keep mask.
        """
        return {}

    def concern(self, diagnostics: Mapping[str, float]) -> str | None:
        """Return a warning if the method did not work as intended, else None.

        Args:
            diagnostics: median over all layers of every fraction, by name; empty without any.
        """
        return None
