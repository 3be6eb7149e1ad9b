"""Time of one token and one layer on a GPU: packed with several sparsities and bits, 2:4, and dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch
from rows import Record
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from lit_prune.ops import NM, Unstructured
from lit_prune.ops.packing import Kind, PackedWeight, pack

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
MACKO = {0.5: 1.48, 0.6: 1.79, 0.7: 2.27, 0.8: 2.91}
"""Somebody else's figures: MACKO-SpMV over dense float16, Llama-2-7B on an RTX 4090, as its authors report them."""
_ROUNDS = 30
Product = Callable[[Tensor], Tensor]


def time_layer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Record:
    """Return the microseconds of torch's dense product, and by how much each form is faster.

    Every product reads another copy of the weight, and the copies of a form are four times as large as the GPU's cache.
    All forms take their turn in every round; the figures are medians over the rounds. What is timed on a GPU are graphs
    that hold all launches of a form, so that the time to launch does not count.
    """
    torch.manual_seed(0)
    weight = (torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype)
    x = torch.randn(1, shape[1], device=device).to(dtype)
    timers = {name: _timer(products, x) for name, products in _forms(weight, x).items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(_ROUNDS + 1 if device.type == "cuda" else 2):
        for name, timer in timers.items():
            found = timer()
            if turn:  # the first round is not counted
                seconds[name].append(found)
    dense = seconds.pop("dense")
    gains = {name: median(a / b for a, b in zip(dense, times, strict=True)) for name, times in seconds.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted: these are no results"
    return {"device": name, "dense_microseconds": 1e6 * median(dense), "gains": gains}


def gain_lines(gains: Mapping[str, float]) -> list[str]:
    """Return gains as lines of text, with other people's below them."""
    mark = ", ".join(f"{sparsity:.0%} {gain}" for sparsity, gain in MACKO.items())
    own = [f"{name}: {gain:.2f} times torch's dense product" for name, gain in gains.items()]
    return [
        *own,
        f"not measured here, the mark: MACKO-SpMV on an RTX 4090, as its authors report for Llama-2-7B: {mark}",
    ]


def _forms(weight: Tensor, x: Tensor) -> dict[str, list[Product]]:
    """Return the copies of each form of a layer, by the form's name."""
    found = {"dense": _copies(weight.nbytes, weight, lambda: _dense(weight.clone()))}
    masks = {f"{sparsity:.0%}": Unstructured(sparsity).mask(torch.rand_like(weight.float())) for sparsity in SPARSITIES}
    masks["2:4"] = NM(2, 4).mask(torch.rand_like(weight.float()))
    floats: Kind = "float16" if weight.dtype == torch.float16 else "bfloat16"
    kinds: tuple[Kind, ...] = (floats, "int8", "int4")
    for pattern, keep in {"no zeros": None, **masks}.items():
        for kind in kinds:
            packed = pack(weight, keep, kind)
            products = _copies(packed.nbytes, weight, lambda packed=packed: _packed(packed))  # type: ignore[misc]
            _check(products[0], packed, x)
            found[f"{pattern}, {kind}"] = products
    if weight.is_cuda:
        sparse = to_sparse_semi_structured(weight * masks["2:4"])
        found["2:4, torch"] = _copies(weight.nbytes // 2, weight, lambda: _dense(sparse.clone()))
    return found


def _copies(size: int, like: Tensor, make: Callable[[], Product]) -> list[Product]:
    cache = torch.cuda.get_device_properties(like.device).L2_cache_size if like.is_cuda else 0
    return [make() for _ in range(max(2, -(-4 * cache // size)))]


def _dense(weight: Tensor) -> Product:
    return lambda x: linear(x, weight)


def _packed(weight: PackedWeight) -> Product:
    from lit_prune.runtime.triton_kernel import TritonKernel

    values, mask, scales = (part.clone() for part in (weight.values, weight.mask, weight.scales))
    return TritonKernel(replace(weight, values=values, mask=mask, scales=scales)).multiply


def _check(product: Product, packed: PackedWeight, x: Tensor) -> None:
    """Raise ``RuntimeError`` if a product is wrong: nothing is timed that computes something else."""
    expected = linear(x.double(), packed.unpack().double())
    error = float((product(x).double() - expected).norm() / expected.norm())
    if not error < 0.01:
        raise RuntimeError(f"the product of a layer packed as {packed.layout} has a relative error of {error:.3g}")


def _timer(products: list[Product], x: Tensor) -> Callable[[], float]:
    """Return a function that computes every product once and returns the seconds of one."""
    if not x.is_cuda:

        def run() -> float:
            start = time.perf_counter()
            for product in products:
                product(x)
            return (time.perf_counter() - start) / len(products)

        return run
    for product in products:
        product(x)  # compiled, and workspaces allocated, before the graph is recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)

    def replay() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(products)

    return replay
