"""The dtype in which weights are processed."""

from __future__ import annotations

import torch
from torch import Tensor


def working(weight: Tensor) -> Tensor:
    """Return the weight in float32, or unchanged if it is float64; the argument is not modified."""
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
