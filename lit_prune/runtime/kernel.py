"""The kernel of packed weights on a device: C++ on CPUs, Triton on CUDA devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from lit_prune.errors import first_line
from lit_prune.ops.packing import PackedWeight, pack
from lit_prune.runtime.cpu_kernel import CpuKernel, library

_CAPABILITY = (8, 0)
"""Lowest compute capability that Triton supports."""


class Kernel(Protocol):
    """Products with a packed weight ``[o, i]``."""

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens for which the packed weight is multiplied as it is."""

    @property
    def most_expanded(self) -> int:
        """Number of weights to expand at once for a product with more tokens."""

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., o]``, of at most ``most_tokens`` tokens ``[..., i]``, in their dtype."""

    def expand(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the rows from ``first`` to ``last`` of the weight, ``[last - first, i]``."""


def kernel_on(device: torch.device) -> Callable[[PackedWeight], Kernel] | None:
    """Return what makes the kernel of a checked weight on a device; None, with a warning, if there is none."""
    if device.type == "cpu":
        loaded = library()
        return partial(CpuKernel, loaded) if loaded else None
    return _triton(device)


@cache
def _triton(device: torch.device) -> Callable[[PackedWeight], Kernel] | None:
    """Return the Triton kernel; None, with a warning, if it does not work on the device."""
    if obstacle := _obstacle(device):
        message = f"packed layers use torch's product of unpacked weights, which is slower: {obstacle}"
        warnings.warn(message, stacklevel=4)
        return None
    from lit_prune.runtime.triton_kernel import TritonKernel

    return TritonKernel


def _obstacle(device: torch.device) -> str | None:
    """Return why the Triton kernel does not work on a device; None if it does."""
    if device.type != "cuda":
        return f"there is no kernel for {device.type} devices"
    try:
        from lit_prune.runtime.triton_kernel import TritonKernel
    except ImportError as error:
        return f"Triton cannot be imported ({first_line(error)}): on Linux, it comes with torch for CUDA"
    try:
        if (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            found, needed = (".".join(map(str, version)) for version in (capability, _CAPABILITY))
            return f"{device} has compute capability {found}, and Triton needs {needed}"
        # On its first use, Triton compiles a part of itself, for which it needs a C compiler, and then the kernel.
        one = torch.ones(1, 1, device=device)
        TritonKernel(pack(one, None, "float16")).multiply(one).item()
    except Exception as error:  # of CUDA, Triton, or the compilers that it starts
        return f"Triton does not work on {device} ({first_line(error)})"
    return None
