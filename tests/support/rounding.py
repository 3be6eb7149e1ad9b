"""What rounding may change: bounds for tests that work one thing out in two ways.

With ``u`` half of a dtype's eps, a sum of ``n`` products in any order, on any processor, is within
``gamma(n) = n u / (1 - n u)`` of the exact one, relative to the sum of the products' sizes; what a backward stable
algorithm finds for a matrix of condition ``k`` is within about ``k eps`` (Higham, Accuracy and Stability of Numerical
Algorithms, sections 3.1 and 7.1). Two results may differ by twice that.

A claim about an algorithm is tested in float64, where these bounds are far below whatever a mistake would change. The
defaults of ``assert_close`` and ``approx``, some ten units of float32, are for examples that are worked out by hand.
"""

import torch
from torch import Tensor, nn

from lit_prune.ops import Pattern
from lit_prune.testing import distance, stable

__all__ = ["check_mask", "check_sums", "distance", "gamma", "network", "stable"]


def gamma(terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Return the error of a sum of so many products, relative to the sum of their sizes."""
    error = terms * torch.finfo(dtype).eps / 2
    assert error < 0.5, f"a sum of {terms} products means nothing in {dtype}"
    return error / (1 - error)


def network(model: nn.Module) -> float:
    """Return how far two ways to compute a model's outputs may be apart, relative to them, in norms.

    No path through a model has more additions than its matrices have rows and columns, attention and norms among them;
    norms keep the activations at one size, so that errors do not grow on the way.
    """
    terms = sum(sum(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1)
    return 2 * gamma(terms, next(model.parameters()).dtype)


def check_sums(actual: Tensor, expected: Tensor, terms: int, sizes: Tensor | float | None = None) -> None:
    """Check, element by element, that two results of the same sums differ by rounding alone.

    Args:
        actual: one result.
        expected: the other; rounding is that of the less precise of the two dtypes.
        terms: products in each sum.
        sizes: the sum of the sizes of each sum's products; None = ``expected``, for sums in which nothing cancels.
    """
    assert actual.shape == expected.shape
    coarser = max(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    bound = 2 * gamma(terms, coarser) * torch.as_tensor(expected.abs() if sizes is None else sizes).double()
    gap = (actual.double() - expected.double()).abs()
    assert bool((gap <= bound).all()), f"{float((gap / bound).max()):.3g} times what rounding can do"


def check_mask(keep: Tensor, scores: Tensor, pattern: Pattern, relative: float) -> None:
    """Check that a keep mask ``[o, i]`` is of the largest scores, but for ties within their relative error.

    With every score moved by its error, in favour of what the mask says, the mask must be that of the largest exactly.
    """
    favoured = torch.where(keep, scores * (1 + relative), scores * (1 - relative))
    wrong = int((pattern.mask(favoured) != keep).sum())
    assert not wrong, f"{wrong} of {keep.numel()} weights were chosen otherwise, and not by rounding"
