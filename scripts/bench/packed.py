"""Time the product of one token and one layer: packed at several sparsities, against torch's dense products.

Weights come from memory: every product reads another copy, and the copies are larger than the last-level cache. All
forms take their turn in every round, and a figure is torch's float32 time over the form's, the median over the rounds.

    OMP_NUM_THREADS=2 python scripts/bench/packed.py --outputs 4096 --inputs 4096
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_prune.ops import NM, Unstructured
from lit_prune.ops.packing import Kind, pack
from lit_prune.runtime.cpu_kernel import CpuKernel, instructions, library

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
KINDS: tuple[Kind, ...] = ("bfloat16", "float16", "int8", "int4")
Product = Callable[[int], Tensor]


def forms(weights: list[Tensor], x: Tensor) -> dict[str, Product]:
    """Return a function of the copy's index for every form of a layer, by name."""
    half, half_x = [weight.bfloat16() for weight in weights], x.bfloat16()
    found: dict[str, Product] = {
        "torch, float32": lambda copy: linear(x, weights[copy]),
        "torch, bfloat16": lambda copy: linear(half_x, half[copy]),
    }
    masks = {f"{sparsity:.0%}": Unstructured(sparsity) for sparsity in SPARSITIES} | {"2:4": NM(2, 4)}
    for kind in KINDS:
        found[f"dense, {kind}"] = packed(weights, None, kind, x)
        for name, pattern in masks.items():
            keep = [pattern.mask(torch.rand_like(weight)) for weight in weights]
            found[f"{name}, {kind}"] = packed(weights, keep, kind, x)
    return found


def packed(weights: list[Tensor], keep: list[Tensor] | None, kind: Kind, x: Tensor) -> Product:
    """Return the product of packed copies."""
    loaded = library()
    assert loaded
    kernels = [
        CpuKernel(loaded, pack(weight, None if keep is None else keep[copy], kind))
        for copy, weight in enumerate(weights)
    ]
    return lambda copy: kernels[copy].multiply(x)


def main() -> None:
    """Time all forms in turn, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1, help="number of input rows, at most 8")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = [torch.randn(options.outputs, options.inputs) / options.inputs**0.5 for _ in range(options.copies)]
    products = forms(weights, torch.randn(options.tokens, options.inputs))
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(options.rounds + 1):
        for name, product in products.items():
            start = time.perf_counter()
            for copy in range(options.copies):
                product(copy)
            if turn:  # the first round is not counted
                seconds[name].append((time.perf_counter() - start) / options.copies)
    base = seconds["torch, float32"]
    print(f"{instructions()}, {torch.get_num_threads()} threads, float32 {1e3 * median(base):.2f} ms\n")
    columns = ("dense", *(f"{sparsity:.0%}" for sparsity in SPARSITIES), "2:4")
    print(f"| values | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind in ("torch, bfloat16", *KINDS):
        names = [f"{column}, {kind}" for column in columns] if kind in KINDS else [kind]
        ratios = [median(a / b for a, b in zip(base, seconds[name], strict=True)) for name in names]
        cells = [f"{ratio:.2f}" for ratio in ratios] + [""] * (len(columns) - len(names))
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
