"""GBLM-Pruner: weights, activations and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import LayerStats
from lit_prune.ops.masks import Group
from lit_prune.ops.precision import working
from lit_prune.ops.stats import GradientNorm
from lit_prune.scorers.base import Scorer


@final
@dataclass(frozen=True)
class GBLM(Scorer):
    """``|W| * ||X_j||₂ + |W| * G``, compared within each row (Das et al., "Beyond Size: GBLM-Pruner", 2023).

    ``G`` is the norm over samples of the gradients of the loss at the dense weights: ``sqrt(Σ (α g)²)`` for l2,
    ``Σ |α g|`` for l1. A sample is one calibration sequence, its loss the mean cross-entropy of its tokens.

    .. code-block:: yaml

        scorer: {class_path: GBLM, init_args: {norm: l2, alpha: 100}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_sq_norm", "gradient"})
    group: ClassVar[Group] = "row"

    norm: GradientNorm = "l2"
    """Norm over samples of the gradients: ``l1`` or ``l2``."""
    alpha: float = 100.0
    """Factor of the gradient term, which balances it against the activation term."""
    gradient_only: bool = False
    """Omit the activation term: ``|W| * G``."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.norm not in ("l1", "l2"):
            raise InputError(f"norm is {self.norm!r}: it must be 'l1' or 'l2'")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"alpha is {self.alpha!r}: it must be a positive number, such as 100")

    @property
    def gradient_norm(self) -> GradientNorm:
        """Norm over samples of the gradients, ``norm``."""
        return self.norm

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return the scores.

        Args:
            weight: ``[o, i]``.
            stats: statistics with ``input_sq_norm`` ``[i]`` (averaged over sequences) and the gradient norm ``[o, i]``.

        Returns:
            ``[o, i]``.
        """
        magnitude = working(weight).abs()
        score = magnitude * self.alpha * stats.gradient(self.norm).to(magnitude)
        return score if self.gradient_only else score + magnitude * stats.input_sq_norm.to(magnitude).sqrt()
