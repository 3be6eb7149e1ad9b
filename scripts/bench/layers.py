"""Compare solvers on real layers: relative output error and seconds for every linear layer of a few blocks.

The inputs are those of the dense model on a calibration set. The time of a factorisation shared by layers with the
same input is counted for the first of them.

    python scripts/bench/layers.py --model out/smollm2-135m --calibration valid.txt --blocks 0 14 29
"""

from __future__ import annotations

import argparse
import time

import torch

from lit_prune.calibration.replay import BlockReplay
from lit_prune.models.blocks import find_blocks
from lit_prune.models.load import load_model
from lit_prune.models.targets import Target, find_targets
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured
from lit_prune.ops.linalg import relative_output_error
from lit_prune.sharding.parameters import read_weight
from lit_prune.solvers import ADMM, SparseGPT
from lit_prune.solvers.base import Solver
from lit_prune.training import TextDataModule

SOLVERS: dict[str, Solver] = {
    "SparseGPT": SparseGPT(),
    "ADMM released": ADMM(as_released=True),
    "ADMM cubic": ADMM(schedule="cubic"),
    "ADMM 20": ADMM(),
    "ADMM 60": ADMM(iterations=60, polish=10),
}
PATTERNS: dict[str, Pattern] = {"50%": Unstructured(0.5), "70%": Unstructured(0.7), "2:4": NM(2, 4)}


def compare(target: Target, stats: LayerStats) -> None:
    """Print the errors and seconds of every solver on one layer."""
    weight = read_weight(target.module)
    for pattern_name, pattern in PATTERNS.items():
        cells = []
        for solver in SOLVERS.values():
            start = time.perf_counter()
            solution = solver.solve(weight, stats, pattern)
            seconds = time.perf_counter() - start
            cells.append(f"{relative_output_error(weight, solution.weight, stats.gram):.5f} {seconds:.2f}s")
        print(f"| {target.name} | {pattern_name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the results as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--calibration", default="wikitext2", help="text source of the calibration set")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    model = load_model(options.model, torch.float32)
    data = TextDataModule(
        options.model, calibration=options.calibration, sequences=options.sequences, seqlen=options.seqlen
    )
    blocks = find_blocks(model)
    targets = find_targets(model, blocks)
    replay = BlockReplay(model, blocks, data.calibration_batches())
    print(f"| layer | pattern | {' | '.join(SOLVERS)} |\n|{'---|' * (2 + len(SOLVERS))}")
    for index in range(max(options.blocks) + 1):
        if index in options.blocks:
            mine = [target for target in targets if target.block == index]
            stats = replay.collect(index, {target.name: target.module for target in mine}, frozenset({"gram"}))
            for target in mine:
                compare(target, stats[target.name])
        replay.advance(index)


if __name__ == "__main__":
    main()
