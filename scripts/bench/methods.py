"""Compare pruning methods on one model: test perplexity, seconds by stage, peak memory.

Each method runs in a process of its own and appends one line to a JSONL file; a method whose line is there is not run
again, so the script can be stopped and continued. It ends by printing the table.

    python scripts/bench/methods.py --model out/smollm2-135m --calibration valid.txt --test test.txt
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import rows
import torch
from lightning.pytorch import Trainer
from rows import Record

from lit_prune.allocators import OWL, AlphaPruning, Measured, Uniform
from lit_prune.allocators.base import Allocator
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
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": Magnitude()},
    "Wanda": {"scorer": Wanda()},
    "GBLM": {"scorer": GBLM(), "cache": "out/cache"},
    "SparseGPT": {"solver": SparseGPT()},
    "ADMM released": {"solver": ADMM(as_released=True)},
    "ADMM cubic": {"solver": ADMM(schedule="cubic")},
    "ADMM": {"solver": ADMM()},
    "SparseGPT corrected": {"solver": SparseGPT(), "correction": 0.3},
    "ADMM corrected": {"solver": ADMM(), "correction": 0.3},
}
BEST = ("ADMM corrected", "ADMM")
"""The two best methods, which are tried with every allocator."""
ALLOCATORS: dict[str, Allocator] = {
    "alpha 0.1": AlphaPruning(epsilon=0.1),
    "alpha 0.2": AlphaPruning(),
    "alpha 0.3": AlphaPruning(epsilon=0.3),
    "alpha by matrix": AlphaPruning(mapping="matrix"),
    "alpha_full": AlphaPruning("alpha_full"),
    "FARMS": AlphaPruning(windows=True),
    "OWL": OWL(),
    "measured": Measured(),
    "measured+alpha": Measured(prior=AlphaPruning()),
}


def plans() -> dict[str, PruningPlan | None]:
    """Return what to compare, by name, what tells most first; None = the dense model."""
    others = [pattern for pattern in PATTERNS if pattern != "70%"]
    wanted = [(method, "70%", "") for method in METHODS]
    wanted += [(method, "70%", allocator) for method in BEST for allocator in ALLOCATORS]
    wanted += [(method, pattern, "") for pattern in others for method in METHODS]
    wanted += [(method, "70%", "alpha 0.2") for method in METHODS]
    wanted += [(method, pattern, allocator) for pattern in others for allocator in ALLOCATORS for method in BEST]
    found: dict[str, PruningPlan | None] = {"dense": None}
    for method, pattern, allocator in wanted:
        name = " ".join(part for part in (method, pattern, allocator) if part)
        found.setdefault(
            name,
            PruningPlan(
                PATTERNS[pattern],
                allocator=ALLOCATORS[allocator] if allocator else Uniform(),
                output_error=False,
                **METHODS[method],
            ),
        )
    return found


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune and evaluate with one method."""
    plan = plans()[name]
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
    if plan is not None:
        report = prune(module.model, data.calibration_batches() if plan.needs_data else [], plan)
        record |= {"sparsity": report.sparsity, "seconds": report.seconds, "peak_memory": peak_memory()}
    start = time.perf_counter()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    record["perplexity"] = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
    record["evaluation_seconds"] = time.perf_counter() - start
    return record


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| method | perplexity | calibrate s | solve s | propagate s | peak memory GiB |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        seconds = record.get("seconds", {})
        shown = ("calibrate", "solve", "propagate")
        stages = [f"{seconds[s]:.1f}" if s in seconds else "" for s in shown]
        memory = f"{record['peak_memory'] / 2**30:.2f}" if record.get("peak_memory") else ""
        lines.append(f"| {record['name']} | {record['perplexity']:.2f} | {' | '.join(stages)} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = rows.parser(__doc__, "out/bench/methods.jsonl")
    parser.add_argument("--calibration", default="wikitext2", help="text source of the calibration set")
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    print(table(rows.measure(list(plans()), lambda name: run(name, options), options)))


if __name__ == "__main__":
    main()
