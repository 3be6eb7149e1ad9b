"""Test the claims of GBLM's paper: perplexities of norms and factors of the gradient term beside Wanda's.

All rows use the same engine and calibration set. Each runs in a separate process and appends one line to a JSONL file;
a row with an existing line is not run again, so the script can be interrupted and resumed. ``--seed`` selects another
calibration set; the gradient norms of each are cached. At the end it prints the tables or inserts them into a
document, and draws the curve and the masks of the middle block.

    python scripts/bench/gblm.py --model out/smollm2-135m --calibration valid.txt --test test.txt --max-windows 32
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from math import log10
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

import rows
from lightning.pytorch import Trainer
from rows import Record
from texts import data_of

from lit_prune.checkpoint.masks import load_masks, save_masks
from lit_prune.ops import NM, PackedMask, Pattern, Unstructured
from lit_prune.ops.masks import density_variances
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.progress import peak_memory
from lit_prune.reporting.figures import as_png, by_block, mask_pictures
from lit_prune.scorers import GBLM, Scorer, Wanda
from lit_prune.training import LitCausalLM

PATTERNS: dict[str, Pattern] = {
    "50%": Unstructured(0.5),
    "2:4": NM(2, 4),
    "50% of the matrix": Unstructured(0.5, group="matrix"),
}
ALPHAS = (0.001, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5)
DRAWN = ("Wanda", "l2 gradient only")
"""Rows whose masks are drawn."""
DRAWN_LAYERS = ("q_proj", "o_proj", "gate_proj", "down_proj")


class Row(NamedTuple):
    """Settings of one row."""

    pattern: str
    scorer: str
    """``Wanda``, or the norm of the gradients and the factor or ``auto`` or ``gradient only``, such as ``l1 300``."""
    sequences: int | None = None
    """Number of calibration sequences; None = that of the command line."""

    def __str__(self) -> str:
        """Return the name of the row."""
        return f"{self.scorer}, {self.pattern}" + (f", {self.sequences} sequences" if self.sequences else "")

    def method(self) -> Scorer:
        """Return the scorer of the row."""
        if self.scorer == "Wanda":
            return Wanda()
        norm, _, factor = self.scorer.partition(" ")
        assert norm in ("l1", "l2")
        chosen: Literal["l1", "l2"] = "l1" if norm == "l1" else "l2"
        if factor == "gradient only":
            return GBLM(chosen, gradient_only=True)
        return GBLM(chosen, alpha="auto" if factor == "auto" else float(factor))


def compared() -> dict[str, Row]:
    """Return all rows by name, the most informative first."""
    factors = [f"{alpha:g}" for alpha in ALPHAS]
    curve = [f"{norm} {factor}" for norm, factor in product(("l1", "l2"), [*factors, "auto", "gradient only"])]
    found = [Row("50%", "Wanda")] + [Row("50%", scorer) for scorer in curve]
    found += [Row("2:4", scorer) for scorer in ("Wanda", *curve)]
    found += [Row("50% of the matrix", scorer) for scorer in DRAWN]
    found += [Row(pattern, scorer, 128) for pattern in ("50%", "2:4") for scorer in ("Wanda", *curve)]
    return {str(row): row for row in found}


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune with one scorer and evaluate."""
    row = compared()[name]
    module = LitCausalLM(options.model, dtype="float32")
    module.configure_model()
    sequences = row.sequences or options.sequences
    data = data_of(options, calibration=options.calibration, test=options.test, sequences=sequences)
    plan = PruningPlan(PATTERNS[row.pattern], row.method(), output_error=False, cache=str(options.cache))
    report = prune(module.model, data.calibration_batches(), plan)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    variances = [density_variances(mask.unpack()) for mask in report.masks.values()]
    if row.scorer in DRAWN and not row.sequences:
        layers = [layer for layer in report.layers if layer.block == report.layers[len(report.layers) // 2].block]
        save_masks(masks_file(row, options), {layer.name: layer.mask for layer in layers})
    return {
        "perplexity": trainer.test(module, data, verbose=False)[0]["test/perplexity"],
        "diagnostics": report.diagnostics,
        "row_variance": median(variance for variance, _ in variances),
        "column_variance": median(variance for _, variance in variances),
        "seconds": report.seconds,
        "cached": bool(report.cached),
        "peak_memory": peak_memory(),
    }


def masks_file(row: Row, options: argparse.Namespace) -> Path:
    """Return the file of the middle block's masks of a row."""
    folder: Path = options.cache
    return folder / f"masks-{row}-{options.seed}.safetensors".replace(" ", "-").replace(",", "")


def tables(records: Sequence[Record]) -> str:
    """Return Markdown tables: perplexities over Wanda's by factor, and the structure of the masks."""
    found = {(compared()[record["name"]], record["seed"]): record for record in records}
    lines = [
        "| pattern | score | sequences | perplexity | over Wanda's | other samples | gradient term / activation term "
        "| mask differs from Wanda's | variance of columns / chance | of rows |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in compared().values():
        if (record := found.get((row, 0))) is None:
            continue
        first = over_wanda(found, row, 0)
        others = [ratio for seed in (1, 2) if (ratio := over_wanda(found, row, seed)) is not None]
        shares = [f"{value:.1%}" for value in record["diagnostics"].values()]
        cells = [
            row.pattern,
            row.scorer,
            str(row.sequences or ""),
            f"{record['perplexity']:.2f}",
            "" if first is None else f"{first:.3f}",
            ", ".join(f"{ratio:.3f}" for ratio in others),
            *(["", *shares] if len(shares) == 1 else shares or ["", ""]),
            f"{record['column_variance']:.2f}",
            f"{record['row_variance']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *means(found)])


def over_wanda(found: dict[tuple[Row, int], Record], row: Row, seed: int) -> float | None:
    """Return the perplexity of a row over Wanda's with the same calibration set; None if one is not measured."""
    record, wanda = found.get((row, seed)), found.get((row._replace(scorer="Wanda"), seed))
    if row.scorer == "Wanda" or record is None or wanda is None:
        return None
    return float(record["perplexity"] / wanda["perplexity"])


def means(found: dict[tuple[Row, int], Record]) -> list[str]:
    """Return a table of the mean ratio to Wanda over the calibration sets, of rows with more than one."""
    lines = []
    for row in compared().values():
        ratios = [ratio for seed in range(3) if (ratio := over_wanda(found, row, seed)) is not None]
        if len(ratios) > 1:
            lines.append(f"| {row} | {len(ratios)} | {fmean(ratios):.4f} |")
    return ["", "| score | samples | mean perplexity over Wanda's |", "|---|---|---|", *lines] if lines else []


def draw(records: Sequence[Record], options: argparse.Namespace) -> None:
    """Draw the perplexities by factor, and the masks of the middle block, if they are measured."""
    found = {(compared()[record["name"]], record["seed"]): record for record in records}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in compared().values():
        norm, _, factor = row.scorer.partition(" ")
        ratio = over_wanda(found, row, options.seed)
        if ratio is not None and not row.sequences and factor not in ("auto", "gradient only"):
            curves.setdefault(f"{norm}, {row.pattern}", []).append((log10(float(factor)), ratio))
    options.figures.mkdir(parents=True, exist_ok=True)
    if curves:
        figure = by_block(curves, "perplexity / Wanda's", over="log10 of alpha")
        (options.figures / "gblm.png").write_bytes(as_png(figure))
    pictures: dict[str, PackedMask] = {}
    for scorer in DRAWN:
        file = masks_file(Row("50% of the matrix", scorer), options)
        masks = load_masks(file) if file.is_file() else {}
        for name, mask in masks.items():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            if kind in DRAWN_LAYERS:
                pictures[f"{scorer}: {kind}"] = mask
    if pictures:
        (options.figures / "gblm_masks.png").write_bytes(as_png(mask_pictures(pictures)))


def main() -> None:
    """Run the missing rows, then print the tables and draw the figures."""
    parser = rows.parser(__doc__, "docs/results/gblm.jsonl")
    parser.add_argument("--calibration", default="wikitext2", help="text source of the calibration set")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=Path("out/cache"), help="folder of gradient norms and masks")
    parser.add_argument("--figures", type=Path, default=Path("docs/results"), help="folder of the figures")
    options: Any = parser.parse_args()
    records = rows.measure(list(compared()), lambda name: run(name, options), options)
    rows.show(tables(records), options.write)
    draw(records, options)


if __name__ == "__main__":
    main()
