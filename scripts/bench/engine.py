"""Time the pruning engine against a lower bound: the counted floating-point operations at the rate of matrix products.

The lower bound is the operation count of the forward passes through the blocks, the Gram matrices (upper triangles)
and the solves, over the median rate of products with the model's own weight, measured in the same process just before
and just after. Attention is counted over all positions, as in torch's flop counter. Each row runs in a separate
process. Memory is the peak in excess of the memory of the process after a first forward pass.

    python scripts/bench/engine.py --model out/smollm2-135m --calibration valid.txt
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import rows
import torch
from rows import Record

from lit_prune.malloc import keep_freed_memory
from lit_prune.models.load import load_model
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.preflight import preflight
from lit_prune.pruning.progress import peak_memory
from lit_prune.scorers import Wanda
from lit_prune.solvers import ADMM, SparseGPT
from lit_prune.training import TextDataModule

HALF = Unstructured(0.5)
PLANS = {
    "Wanda": PruningPlan(HALF, Wanda(), output_error=False),
    "Wanda, two passes": PruningPlan(HALF, Wanda(), output_error=False, sequential=False),
    "SparseGPT": PruningPlan(HALF, solver=SparseGPT(), output_error=False),
    "ADMM": PruningPlan(HALF, solver=ADMM(), output_error=False),
    "ADMM corrected": PruningPlan(HALF, solver=ADMM(), output_error=False, correction=0.3, residual_correction=0.6),
}


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune with a method and return its seconds, its lower bound and its memory."""
    dtype = getattr(torch, options.dtype)
    model: Any = load_model(options.model, dtype)
    data = TextDataModule(
        options.model, calibration=options.calibration, sequences=options.sequences, seqlen=options.seqlen
    )
    batches, plan = data.calibration_batches(), replace(PLANS[name], device=options.device)
    with torch.no_grad():
        model(input_ids=batches[0][:1, :8])  # the weight files are mapped, and in memory only after the first read
    before, rate = peak_memory(), product_rate(model, options)
    expected = preflight(model, batches, plan)
    assert expected is not None
    start = time.perf_counter()
    report = prune(model, batches, plan)
    seconds = time.perf_counter() - start
    rate = (rate + product_rate(model, options)) / 2
    floor = expected.work.total / rate
    assert report.peak_memory is not None and before is not None
    return {
        "dtype": options.dtype,
        "seconds": seconds,
        "stages": report.seconds,
        "expected": expected.seconds,
        "work": asdict(expected.work),
        "rate": rate,
        "floor": floor,
        "ratio": seconds / floor,
        "memory": report.peak_memory - before,
        "expected_memory": expected.memory,
    }


def product_rate(model: Any, options: argparse.Namespace) -> float:
    """Return the floating-point operations per second of products with the model's widest weight, in its own dtype."""
    weight = max((p for p in model.model.layers[0].parameters() if p.dim() == 2), key=torch.Tensor.numel).detach()
    weight = weight.to(options.device or weight.device)
    inputs = torch.randn(4096, weight.shape[1], device=weight.device).to(weight.dtype)
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        inputs @ weight.T
        if weight.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * len(inputs) * weight.numel() / statistics.median(seconds)


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| method | seconds | calibrate | solve | propagate | floor | ratio | GB | foreseen: seconds, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        stages = [f"{record['stages'].get(stage, 0.0):.1f}" for stage in ("calibrate", "solve", "propagate")]
        foreseen = f"{record['expected']:.0f}, {record['expected_memory'] / 1e9:.2f}"
        cells = [
            record["name"],
            f"{record['seconds']:.1f}",
            *stages,
            f"{record['floor']:.1f}",
            f"**{record['ratio']:.2f}**",
            f"{record['memory'] / 1e9:.2f}",
            foreseen,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    keep_freed_memory()
    parser = rows.parser(__doc__, "out/bench/engine.jsonl")
    parser.add_argument("--calibration", default="wikitext2", help="text source of the calibration set")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", help="where blocks are worked on, such as cuda")
    options = parser.parse_args()
    rows.show(table(rows.measure(list(PLANS), lambda name: run(name, options), options)), options.write)


if __name__ == "__main__":
    main()
