"""Time the product of one token and one layer: packed at several sparsities, against torch's dense products.

Weights come from memory: every product reads another copy, and between two products with the same copy the others
read several times as much as the last-level cache holds. All forms take their turn in every round, and a figure is
torch's float32 time over the form's, the median over the rounds.

    OMP_NUM_THREADS=2 python scripts/bench/packed.py --outputs 4096 --inputs 4096
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_prune.ops import NM, Unstructured
from lit_prune.ops.packing import Kind, PackedWeight, pack
from lit_prune.runtime.cpu_kernel import CpuKernel, instructions, library
from lit_prune.runtime.cpu_kernel import forms as available

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
KINDS: tuple[Kind, ...] = ("bfloat16", "float16", "int8", "int4")
CACHES = 4
"""How many times the last-level cache the copies of all forms hold together, at least."""
Product = Callable[[int], Tensor]


@dataclass(frozen=True)
class Form:
    """A way to multiply by a weight: bytes that a product reads, and what returns it for some copies of the weight."""

    nbytes: int
    of_copies: Callable[[int], Product]


def forms(weight: Tensor, x: Tensor, instructions: str | None) -> dict[str, Form]:
    """Return all forms of a layer, by name."""
    found = {"torch, float32": dense(weight, x), "torch, bfloat16": dense(weight.bfloat16(), x.bfloat16())}
    masks = {f"{sparsity:.0%}": Unstructured(sparsity) for sparsity in SPARSITIES} | {"2:4": NM(2, 4)}
    keeps = {name: pattern.mask(torch.rand_like(weight)) for name, pattern in masks.items()}
    for kind in KINDS:
        for name, keep in {"dense": None, **keeps}.items():
            found[f"{name}, {kind}"] = packed(pack(weight, keep, kind), x, instructions)
    return found


def dense(weight: Tensor, x: Tensor) -> Form:
    """Return torch's product."""

    def of_copies(number: int) -> Product:
        copies = [weight.clone() for _ in range(number)]
        return lambda copy: linear(x, copies[copy])

    return Form(weight.nbytes, of_copies)


def packed(weight: PackedWeight, x: Tensor, instructions: str | None) -> Form:
    """Return the kernel's product."""
    loaded = library()
    assert loaded

    def of_copies(number: int) -> Product:
        parts = ("values", "mask", "scales")
        copies = [replace(weight, **{part: getattr(weight, part).clone() for part in parts}) for _ in range(number)]
        kernels = [CpuKernel(loaded, copy, instructions) for copy in copies]
        return lambda copy: kernels[copy].multiply(x)

    return Form(weight.nbytes, of_copies)


def last_level_cache() -> int:
    """Return the size of the largest cache in bytes, as Linux reports it."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(int(size.removesuffix("K")) << 10 for size in sizes)


def main() -> None:
    """Time all forms in turn, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1, help="number of input rows, at most 8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--instructions", choices=available(), default=instructions(), help="of the kernel's form")
    options = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(options.outputs, options.inputs) / options.inputs**0.5
    found = forms(weight, torch.randn(options.tokens, options.inputs), options.instructions)
    cache, one_of_each = last_level_cache(), sum(form.nbytes for form in found.values())
    copies = max(2, math.ceil(CACHES * cache / one_of_each))
    products = {name: form.of_copies(copies) for name, form in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(options.rounds + 1):
        for name, product in products.items():
            start = time.perf_counter()
            for copy in range(copies):
                product(copy)
            if turn:  # the first round is not counted
                seconds[name].append((time.perf_counter() - start) / copies)
    base = seconds["torch, float32"]
    print(f"{options.instructions}, {torch.get_num_threads()} threads, float32 {1e3 * median(base):.2f} ms")
    print(f"{copies} copies, {copies * one_of_each / 1e9:.1f} GB in all; last-level cache {cache / 1e9:.2f} GB\n")
    columns = ("dense", *(f"{sparsity:.0%}" for sparsity in SPARSITIES), "2:4")
    print(f"| values | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind in ("torch, bfloat16", *KINDS):
        names = [f"{column}, {kind}" for column in columns] if kind in KINDS else [kind]
        ratios = [median(a / b for a, b in zip(base, seconds[name], strict=True)) for name in names]
        cells = [f"{ratio:.2f}" for ratio in ratios] + [""] * (len(columns) - len(names))
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
