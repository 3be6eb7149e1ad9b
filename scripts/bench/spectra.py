"""Time the spectra and tail fits of all linear layers of a model against a reference, and compare the alphas.

The reference is ``torch.linalg.svdvals`` of each matrix and a Python loop over the candidates for the tail's start.

    python scripts/bench/spectra.py --model out/smollm2-135m
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.malloc import keep_freed_memory
from lit_prune.models.blocks import find_blocks
from lit_prune.models.load import load_model
from lit_prune.models.targets import find_targets
from lit_prune.ops.parallel import in_parallel
from lit_prune.ops.spectrum import alpha_full, alpha_peak, eigenvalues
from lit_prune.sharding.parameters import read_weight


def plain_alpha(values: Tensor, candidates: list[int]) -> float:
    """Fit the tail from each candidate in turn; return the alpha with the smallest Kolmogorov-Smirnov distance."""
    best, alpha = float("inf"), float("nan")
    logs = values.log()
    for first in candidates:
        count = len(values) - first
        estimate = 1 + count / (logs[first:].sum() - count * logs[first])
        model = 1 - (values[first:] / values[first]) ** (1 - estimate)
        distance = (model - torch.arange(count, device=values.device) / count).abs().max().item()
        if distance < best:
            best, alpha = distance, estimate.item()
    return alpha


def plain_peak(weight: Tensor) -> float:
    """Return the reference value of alpha_peak (corrected)."""
    values = torch.linalg.svdvals(weight.double()).square().flip(0)
    logs = values.log10().float()
    peak = int(torch.histc(logs, 100).argmax())
    left = 10 ** torch.linspace(logs[0].item(), logs[-1].item(), 101)[peak].item()
    inside = ((values > 0.95 * left) & (values < 1.5 * left)).nonzero().flatten().tolist()
    return plain_alpha(values, [first for first in inside if first < len(values) - 1])


def plain_full(weight: Tensor) -> float:
    """Return the reference value of alpha_full."""
    values = torch.linalg.svdvals(weight.double()).square().flip(0)
    return plain_alpha(values, list(range(len(values) - 1)))


def main() -> None:
    """Print one line per metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    model = load_model(options.model, torch.float32)
    weights = [read_weight(target.module) for target in find_targets(model, find_blocks(model))]
    metrics: dict[str, tuple[Callable[[Tensor], float], Callable[[Tensor], float]]] = {
        "alpha_peak": (lambda weight: alpha_peak(eigenvalues(weight)).alpha, plain_peak),
        "alpha_full": (lambda weight: alpha_full(eigenvalues(weight)).alpha, plain_full),
    }
    for name, (ours, plain) in metrics.items():
        start = time.perf_counter()
        mine = list(in_parallel(ours, weights))  # as in AlphaPruning
        middle = time.perf_counter()
        theirs = [plain(weight) for weight in weights]
        seconds, plain_seconds = middle - start, time.perf_counter() - middle
        apart = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        print(
            f"{name}: {len(weights)} matrices in {seconds:.1f} s, the plain way {plain_seconds:.1f} s, ratio "
            f"{plain_seconds / seconds:.1f}, alphas apart by {apart:.1e} at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
