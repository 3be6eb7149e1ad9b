"""Compare ways of structured pruning on one model: perplexity on several texts, parameters, seconds.

Rows are at fractions of all weights in the decoder blocks, so that units of different kinds compare. Each row runs in
a separate process and appends one line to a JSONL file, so that the script can be interrupted and resumed.

    python scripts/bench/structured.py --model out/smollm2-135m --calibration valid.txt --test test.txt embedded
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rows
from rows import Record
from texts import data_of, perplexities

from lit_prune.allocators import AlphaPruning, Measured, Uniform
from lit_prune.allocators.base import Allocator
from lit_prune.ops import Structured
from lit_prune.ops.structured import Unit
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.pruning.progress import peak_memory
from lit_prune.scorers import Magnitude, Wanda
from lit_prune.solvers import ADMM, SparseGPT
from lit_prune.training import LitCausalLM

FRACTIONS = (0.2, 0.4, 0.1, 0.3)
CORRECTED = {"correction": 0.3, "residual_correction": 0.6}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": Magnitude()},
    "Wanda": {"scorer": Wanda()},
    "SparseGPT": {"solver": SparseGPT()},
    "ADMM": {"solver": ADMM()},
    "SparseGPT corrected": {"solver": SparseGPT(), **CORRECTED},
    "ADMM corrected": {"solver": ADMM(), **CORRECTED},
    "ADMM reconstructed": {"solver": ADMM(), **CORRECTED, "reconstruction": Reconstruction()},
}
ALLOCATORS: dict[str, Allocator] = {
    "": Uniform(),
    "alpha 0.1": AlphaPruning(epsilon=0.1),
    "alpha 0.2": AlphaPruning(epsilon=0.2),
    "measured": Measured(),
    "measured time": Measured(budget="time"),
}
ALL = "channels, heads and blocks"
UNITS: dict[str, Sequence[Unit]] = {
    "channels": ["channels"],
    "channels and heads": ["channels", "heads"],
    ALL: ["channels", "heads", "blocks"],
    "heads": ["heads"],
    "blocks": ["blocks"],
}
SHARE = {"channels": 0.75, "heads": 0.25}
"""Shares of the weights of a block of SmolLM2 that belong to the units of each kind."""


class Row(NamedTuple):
    """Settings of one row."""

    method: str
    """Name of the method in ``METHODS``; empty = the dense model."""
    fraction: float = 0.0
    """Fraction of all weights in the blocks."""
    units: str = "channels"
    """Name of the units in ``UNITS``."""
    allocator: str = ""
    """Name of the allocator in ``ALLOCATORS``."""

    def __str__(self) -> str:
        """Return the name of the row."""
        parts = (self.method, f"{self.fraction:.0%}", self.units, self.allocator)
        return ", ".join(filter(None, parts)) if self.method else "dense"

    def plan(self) -> PruningPlan:
        """Return the pruning plan of the row."""
        sparsity = min(self.fraction / SHARE.get(self.units, 1.0), 2 / 3 if self.units == "heads" else 1.0)
        how = METHODS[self.method]
        pattern = Structured(sparsity, UNITS[self.units])
        return PruningPlan(pattern, allocator=ALLOCATORS[self.allocator], output_error=False, **how)


def compared() -> dict[str, Row]:
    """Return all rows by name, the most informative first."""
    found = [Row("")]
    for fraction in FRACTIONS:
        found += [Row(method, fraction) for method in reversed(METHODS)]
        found += [Row("ADMM", fraction, units) for units in ("channels and heads", "blocks")]
        found += [Row("ADMM", fraction, "channels", name) for name in ("alpha 0.1", "alpha 0.2", "measured")]
    found += [Row("ADMM", 0.1, "heads"), Row("ADMM corrected", 0.2, "channels and heads")]
    found += [Row("ADMM corrected", 0.2, "channels", "measured")]
    for fraction in (0.2, 0.4):
        found += [Row("ADMM", fraction, units, "measured") for units in ("channels and heads", ALL)]
        found += [Row("ADMM", fraction, ALL, "measured time")]
    return {str(row): row for row in found}


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune with the settings of a row, and evaluate on every text."""
    row = compared()[name]
    module = LitCausalLM(options.model, dtype="float32")
    module.configure_model()
    record: Record = {}
    if row.method:
        data = data_of(options, calibration=options.calibration, sequences=options.sequences)
        plan = row.plan()
        report = prune(module.model, data.calibration_batches() if plan.needs_data else [], plan)
        record |= {"seconds": report.seconds, "peak_memory": peak_memory()}
        module.model = report.smaller(module.model)
    record["parameters"] = sum(parameter.numel() for parameter in module.model.parameters())
    record["perplexity"] = perplexities(module, options)
    return record


def table(records: list[Record], options: argparse.Namespace) -> str:
    """Return a Markdown table: a way's perplexities on every text, at every fraction."""
    texts = [Path(source).stem for source in options.test]
    found = {record["name"]: record for record in records if record["seed"] == options.seed}
    fractions = sorted(FRACTIONS)
    headings = [f"{text}, {fraction:.0%}" for text in texts for fraction in fractions]
    lines = [
        f"| method | units | widths | {' | '.join(headings)} | seconds at 20% |",
        "|---" * (len(headings) + 4) + "|",
    ]
    ways = dict.fromkeys((row.method, row.units, row.allocator) for row in compared().values())
    for method, units, allocator in ways:
        names = {fraction: str(Row(method, fraction if method else 0.0, units, allocator)) for fraction in fractions}
        if not any(name in found for name in names.values()):
            continue
        cells = [
            f"{found[names[fraction]]['perplexity'][text]:,.2f}" if names[fraction] in found else ""
            for text in texts
            for fraction in fractions
        ]
        seconds = sum(found.get(names[0.2], {}).get("seconds", {}).values())
        widths = (allocator or "uniform") if method else ""
        settings = [method or "dense", units if method else "", widths]
        lines.append(f"| {' | '.join([*settings, *cells, f'{seconds:.0f}' if seconds else ''])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/structured.jsonl")
    parser.add_argument("--calibration", nargs="+", required=True, help="text sources to calibrate on, mixed equally")
    parser.add_argument("--test", nargs="+", required=True, help="text sources to evaluate on")
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    records = rows.measure(list(compared()), lambda name: run(name, options), options)
    rows.show(table(records, options), options.write)


if __name__ == "__main__":
    main()
