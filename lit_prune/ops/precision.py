"""The dtype in which a weight is worked on."""

from __future__ import annotations

import torch
from torch import Tensor


def working(weight: Tensor) -> Tensor:
    """Return the weight in float32, or in float64 if it is that already; the weight itself is never changed."""
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
