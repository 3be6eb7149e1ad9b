"""Compare pruning methods on one model: test perplexity, seconds by stage, peak memory.

Each method runs in a separate process and appends one line to a JSONL file; a method with an existing line is not run
again, so the script can be interrupted and resumed. At the end it prints the tables or inserts them into a document.

    python scripts/bench/methods.py --model out/smollm2-135m --calibration valid.txt --test test.txt
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import rows
import torch
from lightning.pytorch import Trainer
from output_errors import output_errors
from rows import Record

from lit_prune.allocators import LAMP, OWL, AlphaPruning, ErdosRenyi, GlobalMagnitude, Measured, Uniform
from lit_prune.allocators.base import Allocator
from lit_prune.models.load import load_model
from lit_prune.ops import NM, Pattern, Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.progress import peak_memory
from lit_prune.scorers import GBLM, Magnitude, Wanda
from lit_prune.solvers import ADMM, SparseGPT
from lit_prune.training import LitCausalLM, TextDataModule

PATTERNS: dict[str, Pattern] = {
    "50%": Unstructured(0.5),
    "60%": Unstructured(0.6),
    "70%": Unstructured(0.7),
    "80%": Unstructured(0.8),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
}
MIXED = "4:8"
"""Pattern that allocators vary by layer, as in AlphaPruning's paper; 2:4 is fixed, because hardware supports it."""
CORRECTED = {"correction": 0.3, "residual_correction": 0.6}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": Magnitude()},
    "Wanda": {"scorer": Wanda()},
    "GBLM": {"scorer": GBLM(), "cache": "out/cache"},
    "SparseGPT": {"solver": SparseGPT()},
    "ADMM released": {"solver": ADMM(as_released=True)},
    "ADMM cubic": {"solver": ADMM(schedule="cubic")},
    "ADMM": {"solver": ADMM()},
    "SparseGPT corrected": {"solver": SparseGPT(), **CORRECTED},
    "ADMM corrected": {"solver": ADMM(), **CORRECTED},
}
"""Methods that calibrate each layer behind the pruned layers of its own block."""
TWO_PASSES: dict[str, dict[str, Any]] = {
    f"{method}, two passes": {**how, "sequential": False, "residual_correction": 0.0}
    for method, how in METHODS.items()
    if method != "magnitude"
}
"""Methods that calibrate all layers of a block before any of them is pruned; *corrected* is for inputs only."""
ON_DENSE_INPUTS: dict[str, dict[str, Any]] = {
    f"{method} on dense inputs": {**METHODS[method], "propagate": "dense"} for method in ("Wanda", "SparseGPT", "ADMM")
}
"""Methods that save one of two forward passes, compared at 50 and 70 %."""
OBSERVED = 8
"""Number of test windows on which the errors of the layers' outputs are measured."""
BEST = ("ADMM corrected", "ADMM")
"""The two best methods, which are combined with every allocator."""
ALLOCATED = ("Wanda", "SparseGPT", "ADMM")
"""Methods whose gain from each allocator is compared at 70 and 80 %, in one pass and without corrections."""
ALLOCATORS: dict[str, Allocator] = {
    "alpha 0.1": AlphaPruning(epsilon=0.1),
    "alpha 0.2": AlphaPruning(),
    "alpha 0.3": AlphaPruning(epsilon=0.3),
    "alpha by matrix": AlphaPruning(mapping="matrix"),
    "alpha_full": AlphaPruning("alpha_full"),
    "FARMS": AlphaPruning(windows=True),
    "OWL": OWL(),
    "ER": ErdosRenyi(),
    "ER-plus": ErdosRenyi(dense_last=True),
    "LAMP": LAMP(),
    "global magnitude": GlobalMagnitude(),
    "measured": Measured(),
    "measured+alpha": Measured(prior=AlphaPruning()),
}


class Row(NamedTuple):
    """Settings of one row."""

    method: str
    """Name of the method in ``METHODS``, ``TWO_PASSES`` or ``ON_DENSE_INPUTS``; empty = the dense model."""
    pattern: str = ""
    allocator: str = ""
    """Name of the allocator in ``ALLOCATORS``; empty = uniform."""

    def __str__(self) -> str:
        """Return the name of the row."""
        return " ".join(part for part in self if part) or "dense"

    def plan(self) -> PruningPlan:
        """Return the pruning plan of the row."""
        allocator = ALLOCATORS[self.allocator] if self.allocator else Uniform()
        how = {**METHODS, **TWO_PASSES, **ON_DENSE_INPUTS}[self.method]
        return PruningPlan(PATTERNS[self.pattern], allocator=allocator, output_error=False, **how)


def compared() -> dict[str, Row]:
    """Return all rows by name, the most informative first."""
    others = [pattern for pattern in PATTERNS if pattern not in ("70%", MIXED)]
    allocated = [pattern for pattern in PATTERNS if pattern not in ("70%", "2:4")]
    found = [Row("")]
    for methods, best in ((METHODS, BEST), (TWO_PASSES, [f"{method}, two passes" for method in BEST])):
        found += [Row(method, "70%") for method in methods]
        found += [Row(method, "70%", allocator) for method in best for allocator in ALLOCATORS]
        found += [Row(method, pattern) for pattern in others for method in methods]
        found += [Row(method, "70%", "alpha 0.2") for method in methods]
        found += [Row(method, MIXED) for method in best]
        found += [
            Row(method, pattern, allocator) for pattern in allocated for allocator in ALLOCATORS for method in best
        ]
    found += [Row(method, pattern) for pattern in ("50%", "70%") for method in ON_DENSE_INPUTS]
    found += [
        Row(method, pattern, allocator)
        for pattern in ("70%", "80%")
        for method in ALLOCATED
        for allocator in ("", *ALLOCATORS)
    ]
    return {str(row): row for row in found}


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune and evaluate with one method."""
    row = compared()[name]
    module = LitCausalLM(options.model, dtype="float32")
    module.configure_model()
    data = TextDataModule(
        options.model,
        calibration=options.calibration,
        test=options.test,
        sequences=options.sequences,
        seqlen=options.seqlen,
        seed=options.seed,
        max_windows=options.max_windows,
    )
    record: Record = {"threads": torch.get_num_threads()}
    if row.method:
        plan = row.plan()
        report = prune(module.model, data.calibration_batches() if plan.needs_data else [], plan)
        record |= {"sparsity": report.sparsity, "seconds": report.seconds, "peak_memory": peak_memory()}
    start = time.perf_counter()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    record["perplexity"] = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
    record["evaluation_seconds"] = time.perf_counter() - start
    if row.method:
        windows = [batch["input_ids"] for batch in islice(data.test_dataloader(), OBSERVED)]
        dense = load_model(options.model, torch.float32).eval()
        record["output_errors"] = output_errors(
            dense, module.model.eval(), [layer.name for layer in report.layers], windows
        )
    return record


def tables(records: list[Record]) -> str:
    """Return Markdown tables: perplexities by method and pattern, perplexities of other samples, seconds and memory."""
    found = {(compared()[record["name"]], record["seed"]): record for record in records}
    seeds = sorted({seed for _, seed in found})
    methods = dict.fromkeys((row.method, row.allocator) for row in compared().values() if (row, seeds[0]) in found)
    lines = [f"| method | {' | '.join(PATTERNS)} |", "|---|" + "---|" * len(PATTERNS)]
    for method, allocator in methods:
        perplexities = [_perplexity(found.get((Row(method, pattern, allocator), seeds[0]))) for pattern in PATTERNS]
        if not method:
            perplexities = [_perplexity(found[Row(""), seeds[0]])] * len(PATTERNS)
        lines.append(f"| {_label(method, allocator)} | {' | '.join(perplexities)} |")
    again = [row for row in compared().values() if row.method and any((row, seed) in found for seed in seeds[1:])]
    if again:
        lines += ["", f"| calibration sample | {' | '.join(map(str, seeds))} |", "|---|" + "---|" * len(seeds)]
    for row in again:
        lines.append(f"| {row} | {' | '.join(_perplexity(found.get((row, seed))) for seed in seeds)} |")
    stages = ("calibrate", "solve", "propagate")
    lines += ["", f"| seconds at 70% | before | {' | '.join(stages)} | all | peak memory GiB |", "|---|" + "---|" * 6]
    for method, allocator in methods:
        record = found.get((Row(method, "70%", allocator), seeds[0]))
        if record is not None:
            total = sum(record["seconds"].values())
            seconds = [record["seconds"].get(stage, 0.0) for stage in stages]
            times = [f"{value:.0f}" if value else "" for value in (total - sum(seconds), *seconds, total)]
            memory = f"{record['peak_memory'] / 2**30:.2f}"
            lines.append(f"| {_label(method, allocator)} | {' | '.join(times)} | {memory} |")
    return "\n".join([*lines, *_output_errors(found, seeds[0])])


def _output_errors(found: Mapping[tuple[Row, int], Record], seed: int) -> list[str]:
    """Return a table of the errors of the layers' outputs at 70 %, of the rows that have them."""
    measured = {
        row: record["output_errors"]
        for (row, of), record in found.items()
        if of == seed and row.pattern == "70%" and "output_errors" in record
    }
    if not measured:
        return []
    kinds = list(next(iter(measured.values())))
    lines = ["", f"| error of the outputs at 70% | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for row, errors in measured.items():
        cells = [f"{errors[kind]:.3f}" for kind in kinds]
        lines.append(f"| {_label(row.method, row.allocator)} | {' | '.join(cells)} |")
    return lines


def _label(method: str, allocator: str) -> str:
    return f"{method}, {allocator}" if allocator else method or "dense"


def _perplexity(record: Record | None) -> str:
    return f"{record['perplexity']:,.2f}" if record else ""


def main() -> None:
    """Run the missing rows, then print the tables."""
    parser = rows.parser(__doc__, "out/bench/methods.jsonl")
    parser.add_argument("--calibration", default="wikitext2", help="text source of the calibration set")
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    records = rows.measure(list(compared()), lambda name: run(name, options), options)
    rows.show(tables(records), options.write)


if __name__ == "__main__":
    main()
