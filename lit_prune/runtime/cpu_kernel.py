"""The C++ kernel of packed weights: compiled on first use, loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import constants
from torch import Tensor

from lit_prune.errors import first_line
from lit_prune.ops.packing import Kind, PackedWeight

MOST_TOKENS = 8
"""Largest number of tokens that the kernel multiplies at once."""
_SOURCE = Path(__file__).parent / "kernels" / "packed.cpp"
_HEADERS = sorted(_SOURCE.parent.glob("*.h"))
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp")
_FEW_WEIGHTS = 1 << 16
"""Number of weights below which one thread is faster than several."""


class _Weight(ctypes.Structure):
    """The struct ``Weight`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mask", "values", "offsets", "scales")),
        *((name, ctypes.c_int32) for name in ("outputs", "chunks", "groups", "kind", "kept_of_8")),
    ]


class CpuKernel:
    """Products and expansion of a packed weight whose parts are on the CPU and have been checked."""

    most_tokens = MOST_TOKENS
    most_expanded = 1 << 18
    """Number of weights to expand at once: 1 MB, which stays in the cache."""

    def __init__(self, library: ctypes.CDLL, weight: PackedWeight, instructions: str | None = None) -> None:
        """Store the weight.

        Args:
            library: the loaded kernel, from ``library``.
            weight: a packed weight for which ``check`` raises nothing; the kernel does not look for errors.
            instructions: one of ``forms()``; None = the first.
        """
        available = _available(library)
        layout = weight.layout
        parts = (weight.mask, weight.values, weight.scales)
        mask, values, scales = (part.contiguous() for part in parts)
        self._parts = (mask, values, weight.offsets().contiguous(), scales)  # kept alive for the pointers
        pointers = [part.data_ptr() if part.numel() else None for part in self._parts]
        kind = get_args(Kind).index(layout.kind)
        sizes = (layout.shape[0], layout.chunks, layout.groups or layout.chunks)
        self._weight = _Weight(*pointers, *sizes, kind, weight.kept_of_8())
        self._library, self._pointer = library, ctypes.byref(self._weight)
        self.shape = layout.shape
        self._form = available[instructions or next(iter(available))]
        self._several = layout.shape[0] * layout.chunks * 64 >= _FEW_WEIGHTS

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., o]``, of at most 8 tokens ``[..., i]``, in their dtype; sums are in float32.

        With 8- and 4-bit values, the inputs are rounded to 8 bits, with a scale for every 32 of a token.
        """
        outputs, inputs = self.shape
        dtype, x, tokens = x.dtype, x.float().contiguous(), x.numel() // inputs
        if x.shape[-1] != inputs or tokens > MOST_TOKENS or x.device.type != "cpu":
            raise ValueError(
                f"inputs have the shape {list(x.shape)} on {x.device}: at most {MOST_TOKENS} tokens of {inputs} on the "
                "CPU are needed"
            )
        y = torch.empty(*x.shape[:-1], outputs)
        if not tokens:
            return y.to(dtype)
        threads = torch.get_num_threads() if self._several else 1
        self._library.lit_prune_multiply(self._pointer, x.data_ptr(), tokens, inputs, y.data_ptr(), threads, self._form)
        return y.to(dtype)

    def expand(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows from ``first`` to ``last`` of the weight, ``[last - first, i]``."""
        rows = torch.empty(last - first, self.shape[1])
        threads = torch.get_num_threads() if self._several else 1
        self._library.lit_prune_expand(self._pointer, first, last, self.shape[1], rows.data_ptr(), threads, self._form)
        return rows.to(dtype)


@cache
def library() -> ctypes.CDLL | None:
    """Return the loaded kernel; None, with a warning, if it cannot be compiled here.

    It is compiled once with ``g++`` or ``c++``, for every version of source and compiler, to the folder ``lit-prune``
    beside the hub's cache.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        _warn("there is no C++ compiler: install g++, or set CXX")
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except subprocess.CalledProcessError as error:
        _warn(f"{compiler} does not compile the kernel ({first_line(error.stderr.strip() or error)})")
    except OSError as error:
        _warn(f"the kernel cannot be built or loaded ({first_line(error)})")
    return None


def _warn(reason: str) -> None:
    warnings.warn(f"packed layers use torch's product of unpacked weights, which is slower: {reason}", stacklevel=4)


def _compiled(compiler: str) -> Path:
    """Return the path of the shared library, after compiling it if it is not in the cache."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [file.read_text() for file in (_SOURCE, *_HEADERS)]
    key = "\0".join((*sources, compiler, version, *_FLAGS))
    name = f"packed-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path = Path(constants.HF_HOME).expanduser() / "lit-prune" / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built, shared = Path(folder) / "packed.o", Path(folder) / name
        # Linked without OpenMP: torch has loaded its own, and a second one would add as many threads again.
        for command in ([*_FLAGS, "-c", str(_SOURCE), "-o", str(built)], ["-shared", str(built), "-o", str(shared)]):
            subprocess.run([compiler, *command], capture_output=True, text=True, check=True)
        shared.replace(path)  # at once, for other processes that compile it too
    return path


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of a library's functions."""
    number, pointer = ctypes.c_int, ctypes.c_void_p
    loaded.lit_prune_instructions.argtypes = [number]
    loaded.lit_prune_instructions.restype = ctypes.c_char_p
    loaded.lit_prune_multiply.argtypes = [pointer, pointer, number, number, pointer, number, number]
    loaded.lit_prune_multiply.restype = None
    loaded.lit_prune_expand.argtypes = [pointer, number, number, number, pointer, number, number]
    loaded.lit_prune_expand.restype = None
    return loaded


def _available(loaded: ctypes.CDLL) -> dict[str, int]:
    """Return the numbers of the kernel's forms that this processor can run by their instructions, the fastest first."""
    names = takewhile(lambda name: name is not None, map(loaded.lit_prune_instructions, count()))
    return {name.decode(): number for number, name in enumerate(names) if name}


def forms() -> tuple[str, ...]:
    """Return the instructions for which the kernel has a form and that this processor has, the fastest first."""
    loaded = library()
    return tuple(_available(loaded)) if loaded else ()


def instructions() -> str:
    """Return the instructions that the kernel uses on this processor, such as ``AVX2``; ``none`` without a kernel."""
    return next(iter(forms()), "none")
