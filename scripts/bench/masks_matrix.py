"""Verify that masks hold under every strategy, precision and optimizer, in real processes.

Each cell trains a tiny random Llama for 20 optimizer steps, with accumulation, gradient clipping and weight decay, and
prunes it at steps 0 and 10. Nonzero pruned weights are counted after every batch, in every process, in the live module,
the float32 masters and the optimizer moments; then in the last checkpoint and in the exported folder, read back from
disk. Each cell runs in separate processes and appends one line to a JSONL file; a cell with an existing line is not run
again. The table is inserted between the markers of a Markdown file. The test suite trains some of the cells with the
same code: ``tests/support/cells.py``.

    python scripts/bench/masks_matrix.py --write docs/masks.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import rows

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support import fork_server
from support.cells import OPTIMIZERS, PLACES, STRATEGIES, run

CELLS = [" ".join(cell) for cell in product(STRATEGIES, ("32-true", "bf16-mixed", "bf16-true"), OPTIMIZERS)]
"""Names of the cells: strategy, precision and optimizer, such as ``ZeRO-2 bf16-mixed AdamW``."""


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| strategy | precision | optimizer | live module | masters | moments | checkpoint | export | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        strategy, precision, optimizer = record["cell"].split()
        strategy = strategy if strategy == "single" else f"{strategy} x2"
        if "error" in record:
            figures = f"refused: {record['error']} | | | | |"
        else:
            counts = [f"{record[place][0]:,} of {record[place][1]:,}" if record[place][1] else "–" for place in PLACES]
            figures = " | ".join([*counts, f"{record['difference']:.1e}" if "difference" in record else ""])
        lines.append(f"| {strategy} | {precision} | {optimizer} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing cells, then print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/masks"), help="folder of results")
    parser.add_argument("--match", default="*", help="shell pattern of the cells to run, such as 'ZeRO-* 32-true *'")
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    options = parser.parse_args()
    results = options.out / "results.jsonl"
    done = {record["cell"] for record in rows.read(results)}
    with fork_server.running():
        for cell in CELLS:
            if fnmatchcase(cell, options.match) and cell not in done:
                record = run(cell, options.out)
                rows.append(results, record)
                print(json.dumps(record), flush=True)
    rows.show(table(sorted(rows.read(results), key=lambda record: CELLS.index(record["cell"]))), options.write)


if __name__ == "__main__":
    main()
