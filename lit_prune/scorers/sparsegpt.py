"""The SparseGPT saliency: the cost of removing one weight when the others compensate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.ops import LayerStats
from lit_prune.ops.linalg import check_damping
from lit_prune.ops.precision import working
from lit_prune.scorers.base import Scorer


@final
@dataclass(frozen=True)
class SparseGPTSaliency(Scorer):
    """``(W_rj / U_jj)²``, with ``UᵀU`` the inverse of the damped Gram matrix (Frantar & Alistarh, "SparseGPT", 2023).

    Scores all dense weights at once; the solver ``SparseGPT`` applies the same saliency column by column, to weights
    that it has already updated.

    .. code-block:: yaml

        scorer: {class_path: SparseGPTSaliency, init_args: {damping: 0.01}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = 0.01
    """Damping added to the diagonal of the Gram matrix, as a fraction of the diagonal's mean."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        check_damping(self.damping)

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return the saliency ``[o, i]``; ``stats`` must contain the Gram matrix ``[i, i]``."""
        scale = stats.inverse_cholesky(self.damping).diagonal()
        return (working(weight) / scale.to(weight.device)).square()
