"""Compiles the Triton kernel for a GPU that is not there: ``python gpu_compiler.py cuda 90 32``.

Whatever the kernel's products would start on the GPU is compiled, to machine code, and not started.
"""

import sys
from functools import partialmethod
from itertools import product
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lit_prune.ops.packing import Kind, pack
from lit_prune.runtime.triton_kernel import MOST_TOKENS, TritonKernel


class AbsentGpu:
    """Driver of a GPU that can be compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """Compile every kind of product for the target that the arguments name, and print the number of binaries."""
    backend, architecture, warp = sys.argv[1:]
    target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp))
    triton.runtime.driver.set_active(AbsentGpu(target))
    binaries: set[bytes] = set()
    run: Any = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled = run(self, *args, **{**kwargs, "warmup": True})
        binaries.add(compiled.asm["cubin" if backend == "cuda" else "hsaco"])

    JITFunction.run = partialmethod(compile_only)
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16, "int4": torch.float32}
    of_kinds = product(get_args(Kind), (True, False), (640,))
    for kind, masked, inputs in (*of_kinds, ("float16", True, 130)):  # for 130, loads are of single elements
        weight = torch.randn(32, inputs)
        kernel = TritonKernel(pack(weight, weight > 0 if masked else None, kind))
        for tokens in (1, MOST_TOKENS):
            kernel.multiply(torch.ones(tokens, inputs, dtype=dtypes[kind]))
        kernel.expand(0, 2, dtypes[kind])
    print(len(binaries), "binaries")


if __name__ == "__main__":
    main()
