"""Wanda: weights and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.ops import LayerStats
from lit_prune.ops.masks import Group
from lit_prune.ops.precision import working
from lit_prune.scorers.base import Scorer


@final
@dataclass(frozen=True)
class Wanda(Scorer):
    """``|W_rj| * ||X_j||₂``, compared within each row (Sun et al., "A Simple and Effective Pruning Approach", 2023).

    .. code-block:: yaml

        scorer: {class_path: Wanda}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_sq_norm"})
    group: ClassVar[Group] = "row"

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return the scores.

        Args:
            weight: ``[o, i]``.
            stats: statistics with ``input_sq_norm`` ``[i]``, the squared input norms averaged over sequences.

        Returns:
            ``[o, i]``, in units of the layer's output.
        """
        magnitude = working(weight).abs()
        return magnitude * stats.input_sq_norm.to(magnitude).sqrt()
