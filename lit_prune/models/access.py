"""Read and write one layer's weight, whole and as ``[o, i]``, however the module stores it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PRUNABLE = (nn.Linear, Conv1D)
"""The module types whose ``weight`` is a matrix of outputs and inputs."""


def to_parameter_layout(module: nn.Module, matrix: Tensor) -> Tensor:
    """Turn an ``[o, i]`` tensor into the layout of ``module.weight``, or back (GPT-2's Conv1D stores ``[i, o]``)."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def read_weight(module: nn.Module) -> Tensor:
    """Return the weight as ``[o, i]``: a view of the parameter, not to be written to."""
    return to_parameter_layout(module, module.get_parameter("weight").detach())


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace the weight's values by ``weight`` ``[o, i]``; the parameter keeps its identity, dtype and device."""
    module.get_parameter("weight").copy_(to_parameter_layout(module, weight))


@contextmanager
def weights_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules' weights back afterwards, bit for bit, whatever happens in between."""
    before = [read_weight(module).clone() for module in modules]
    try:
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            write_weight(module, weight)
