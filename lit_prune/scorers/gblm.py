"""GBLM-Pruner: weights, activations and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import LayerStats, Pattern, select
from lit_prune.ops.masks import Group
from lit_prune.ops.precision import working
from lit_prune.ops.stats import GradientNorm
from lit_prune.scorers.base import Scorer
from lit_prune.scorers.wanda import Wanda

_SHARE, _CHANGED = "gradient term / activation term", "mask differs from Wanda's"
"""Names of the diagnostics."""
_LEAST_SHARE = 0.02
"""Median ratio of the terms below which the masks are little different from Wanda's."""


@final
@dataclass(frozen=True)
class GBLM(Scorer):
    """``|W| * ||X_j||₂ + |W| * G``, compared within each row (Das et al., "Beyond Size: GBLM-Pruner", 2023).

    ``G`` is the norm over samples of the gradients of the loss at the dense weights: ``sqrt(Σ (α g)²)`` for l2,
    ``Σ |α g|`` for l1. A sample is one calibration sequence, its loss the mean cross-entropy of its tokens.

    The report states the median ratio of the two terms, and how much of the mask differs from Wanda's. A ratio below
    2 % is a warning: the gradients then hardly affect the mask.

    .. code-block:: yaml

        scorer: {class_path: GBLM, init_args: {norm: l2, alpha: 100}}
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_sq_norm", "gradient"})
    group: ClassVar[Group] = "row"

    norm: GradientNorm = "l2"
    """Norm over samples of the gradients: ``l1`` or ``l2``."""
    alpha: float | Literal["auto"] = 100.0
    """Factor of the gradient term, which balances it against the activation term; ``auto`` = in each layer, the factor
    at which the median ratio of the terms is ``share``."""
    share: float = 0.2
    """Median ratio of the gradient term to the activation term in each layer; applies with ``alpha: auto``."""
    gradient_only: bool = False
    """Omit the activation term: ``|W| * G``."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.norm not in ("l1", "l2"):
            raise InputError(f"norm is {self.norm!r}: it must be 'l1' or 'l2'")
        if self.alpha != "auto" and not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < float("inf")):
            raise InputError(f"alpha is {self.alpha!r}: it must be a positive number, such as 100, or auto")
        if not 0 < self.share < float("inf"):
            raise InputError(f"share is {self.share!r}: it must be a positive number, such as 0.2")
        if self.alpha == "auto" and self.gradient_only:
            raise InputError("alpha is 'auto', which balances two terms, and gradient_only omits one: give a number")

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
        score = magnitude * self._alpha(stats) * stats.gradient(self.norm).to(magnitude)
        return score if self.gradient_only else score + magnitude * stats.input_sq_norm.to(magnitude).sqrt()

    def diagnose(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> dict[str, float]:
        """Return the median ratio of the terms, and the fraction of the mask that differs from Wanda's."""
        keep = [select(scorer.score(weight, stats), pattern) for scorer in (self, Wanda())]
        changed = (keep[0] != keep[1]).double().mean().item()
        return {_CHANGED: changed} if self.gradient_only else {_SHARE: self._ratio(stats), _CHANGED: changed}

    def concern(self, diagnostics: Mapping[str, float]) -> str | None:
        """Return a warning if the gradient term is negligible."""
        ratio = diagnostics.get(_SHARE, 1.0)
        if ratio >= _LEAST_SHARE:
            return None
        return (
            f"the gradient term of GBLM is {ratio:.2%} of the activation term (median), and "
            f"{diagnostics[_CHANGED]:.2%} of the mask differs from Wanda's: raise plan.scorer.alpha, which is "
            f"{self.alpha}, or set it to auto"
        )

    def _alpha(self, stats: LayerStats) -> float:
        if self.alpha != "auto":
            return self.alpha
        if not (ratio := _median_ratio(stats, self.norm)):
            raise NumericalError("alpha is 'auto', and the gradients of most weights are zero: give a number")
        return self.share / ratio

    def _ratio(self, stats: LayerStats) -> float:
        return self._alpha(stats) * _median_ratio(stats, self.norm)


def _median_ratio(stats: LayerStats, norm: GradientNorm) -> float:
    """Return the median of ``G_rj / ||X_j||`` over the weights with an input that is not always zero; 0 if none has."""
    activation = stats.input_sq_norm.sqrt()
    alive = activation > 0
    if not alive.any():
        return 0.0
    gradient = stats.gradient(norm).to(activation)  # gradients wait in CPU memory
    return (gradient[:, alive] / activation[alive]).median().item()
