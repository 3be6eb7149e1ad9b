"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lit_prune.ops import LayerStats
from lit_prune.ops.precision import working
from lit_prune.scorers.base import Scorer


@final
@dataclass(frozen=True)
class Magnitude(Scorer):
    """Magnitude ``|W|``. Needs no data (Han et al., "Learning both Weights and Connections", 2015).

    .. code-block:: yaml

        scorer: {class_path: Magnitude}
    """

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return ``|W|`` ``[o, i]``."""
        return working(weight).abs()
