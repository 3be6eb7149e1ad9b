"""Compare calibration texts: perplexities on several texts of a model that was calibrated on one of them or a mixture.

Each row is one method, sparsity, calibration text and number of sequences; it runs in a separate process and appends
one line to a JSONL file. A row with an existing line is not run again, so the script can be interrupted and resumed. At
the end it prints the table or inserts it into a document. The last text should be of a kind that nothing is calibrated
on.

    python scripts/bench/texts.py --model out/smollm2-135m --calibration valid.txt embedded \
        --test test.txt embedded other.txt --max-windows 32
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import rows
from lightning.pytorch import Trainer
from methods import METHODS, PATTERNS, TWO_PASSES
from rows import Record

from lit_prune.pruning import PruningPlan, prune
from lit_prune.training import LitCausalLM, TextDataModule

COMPARED = ("ADMM corrected", "ADMM corrected, two passes", "SparseGPT", "ADMM", "SparseGPT corrected")
"""Methods to compare, by their names in ``methods.py``."""
SEQUENCES = (32, 128, 512)
"""Sizes of the calibration set: 16,384 to 262,144 tokens in sequences of 512."""
MIXTURE = "mixture"


class Row(NamedTuple):
    """Settings of one row."""

    method: str
    """Name of the method in ``METHODS`` or ``TWO_PASSES``; empty = the dense model."""
    pattern: str
    calibration: str
    """Name of the calibration text, or ``mixture`` of all of them in equal parts."""
    sequences: int

    def __str__(self) -> str:
        """Return the name of the row."""
        return f"{self.method}, {self.pattern}, {self.calibration}, {self.sequences}" if self.method else "dense"


def compared(options: argparse.Namespace) -> dict[str, Row]:
    """Return all rows by name, the fastest first; the dense model has the empty method."""
    texts = [_name(source) for source in options.calibration]
    settings = product(SEQUENCES, ("70%", "50%"), [*texts, MIXTURE] if len(texts) > 1 else texts, COMPARED)
    found = [Row("", "", "", 0)]
    found += [Row(method, pattern, text, sequences) for sequences, pattern, text, method in settings]
    return {str(row): row for row in found}


def run(row: Row, options: argparse.Namespace) -> Record:
    """Prune with the settings of a row, and evaluate on every text."""
    module = LitCausalLM(options.model, dtype="float32")
    module.configure_model()
    record: Record = {}
    if row.method:
        chosen = [source for source in options.calibration if row.calibration in (_name(source), MIXTURE)]
        data = data_of(options, calibration=chosen, sequences=row.sequences)
        how = {**METHODS, **TWO_PASSES}[row.method]
        report = prune(
            module.model, data.calibration_batches(), PruningPlan(PATTERNS[row.pattern], output_error=False, **how)
        )
        record["seconds"] = report.seconds
    record["perplexity"] = perplexities(module, options)
    return record


def perplexities(module: LitCausalLM, options: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity of a model on every test text, by name."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    return {
        _name(source): trainer.test(module, data_of(options, test=source), verbose=False)[0]["test/perplexity"]
        for source in options.test
    }


def data_of(options: argparse.Namespace, **sources: Any) -> TextDataModule:
    """Return a data module with the options common to all rows."""
    return TextDataModule(
        options.model,
        dataset="embedded",
        seqlen=options.seqlen,
        seed=options.seed,
        max_windows=options.max_windows,
        **sources,
    )


def table(records: list[Record], options: argparse.Namespace) -> str:
    """Return a Markdown table: a row's perplexities on every text, and their geometric mean."""
    names = [_name(source) for source in options.test]
    found = {record["name"]: record for record in records if record["seed"] == options.seed}
    lines = [
        f"| method | sparsity | calibrated on | tokens | {' | '.join(names)} | geometric mean | seconds |",
        "|---|---|---|---|" + "---|" * (len(names) + 2),
    ]
    for name, row in compared(options).items():
        if name not in found:
            continue
        values = [found[name]["perplexity"][text] for text in names]
        tokens = f"{row.sequences * options.seqlen:,}" if row.method else ""
        settings = [row.method or "dense", row.pattern, row.calibration, tokens]
        figures = [f"{value:,.2f}" for value in (*values, geometric_mean(values))]
        seconds = f"{sum(found[name].get('seconds', {}).values()):.0f}"
        lines.append(f"| {' | '.join([*settings, *figures, seconds])} |")
    return "\n".join(lines)


def _name(source: str) -> str:
    return Path(source).stem


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/texts.jsonl")
    parser.add_argument("--calibration", nargs="+", required=True, help="text sources to calibrate on, and to mix")
    parser.conflict_handler = "resolve"
    parser.add_argument("--test", nargs="+", required=True, help="text sources to evaluate on")
    options = parser.parse_args()
    records = rows.measure(list(compared(options)), lambda name: run(compared(options)[name], options), options)
    rows.show(table(records, options), options.write)


if __name__ == "__main__":
    main()
