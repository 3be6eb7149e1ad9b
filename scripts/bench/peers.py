"""Compare lit-prune with llm-compressor on the same model and sequences: seconds, peak memory, perplexity.

llm-compressor must be installed in a separate virtual environment by ``pip install llmcompressor==0.14.0``. Every row
runs in a separate process, with the same calibration tokens. Seconds include only the pruning. The pruned models are
evaluated by this script, on the same windows. After runs with several values of ``--seed``, the table has medians.

    python scripts/bench/peers.py --peer venv-peer/bin/python --calibration valid.txt --test test.txt
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import rows
import torch
from lightning.pytorch import Trainer
from rows import Record

from lit_prune.training import LitCausalLM, TextDataModule

METHODS = ("Wanda", "SparseGPT")
OURS, OURS_HALF, THEIRS = "lit-prune", "lit-prune, bf16 forwards", "llm-compressor"
WORKER = Path(__file__).with_name("peer_worker.py")


def names() -> list[str]:
    """Return the names of the rows."""
    return [f"{method}: {who}" for method in METHODS for who in (OURS, OURS_HALF, THEIRS)]


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune in a separate process, and evaluate in this one."""
    method, _, who = name.partition(": ")
    folder = options.work / name.replace(": ", "-").replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / "tokens.json"
    data = TextDataModule(
        options.model, calibration=options.calibration, sequences=options.sequences, seqlen=options.seqlen
    )
    tokens.write_text(json.dumps(torch.cat(data.calibration_batches()).tolist()))
    python = options.peer if who == THEIRS else Path(sys.executable)
    arguments = ["--model", options.model, "--method", method, "--tokens", str(tokens), "--output", str(folder / "out")]
    if who == OURS_HALF:
        arguments.append("--half")
    command = [str(python), str(WORKER), "theirs" if who == THEIRS else "ours", *arguments]
    subprocess.run(command, check=True)
    return {**json.loads((folder / "out" / "figures.json").read_text()), **evaluate(folder / "out", options)}


def perplexity_of(module: LitCausalLM, options: argparse.Namespace) -> float:
    """Return the perplexity on the test text."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    data = TextDataModule(options.model, test=options.test, seqlen=options.seqlen, max_windows=options.max_windows)
    return trainer.test(module, data, verbose=False)[0]["test/perplexity"]


def evaluate(folder: Path, options: argparse.Namespace) -> Record:
    """Return the perplexity on the test text, and the sparsity of the linear layers."""
    module = LitCausalLM(str(folder), dtype="float32")
    module.configure_model()
    perplexity = perplexity_of(module, options)
    layers = [p for name, p in module.model.named_parameters() if "proj" in name and p.dim() == 2]
    zeros = sum(int((p == 0).sum()) for p in layers) / sum(p.numel() for p in layers)
    return {"perplexity": perplexity, "sparsity": zeros}


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| method | by | seconds | times as fast | peak memory GB | sparsity | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = {name: [record for record in records if record["name"] == name] for name in names()}
    medians = {
        name: {key: statistics.median(run[key] for run in mine if key in run) for key in mine[0] if key != "name"}
        for name, mine in runs.items()
        if mine
    }
    for name, record in medians.items():
        method, _, who = name.partition(": ")
        theirs = medians.get(f"{method}: {THEIRS}")
        faster = f"**{theirs['seconds'] / record['seconds']:.2f}**" if theirs and who != THEIRS else ""
        each = ", ".join(f"{run['seconds']:.0f}" for run in runs[name])
        seconds = f"{record['seconds']:.1f} ({each})"
        memory, sparsity = f"{record['peak_memory'] / 1e9:.2f}", f"{record['sparsity']:.4f}"
        cells = (method, who, seconds, faster, memory, sparsity, f"{record['perplexity']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/peers.jsonl")
    parser.add_argument("--peer", type=Path, required=True, help="Python that has llm-compressor")
    parser.add_argument("--calibration", default="wikitext2", help="text source of the calibration set")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("out/bench/peers"), help="folder for pruned models")
    options = parser.parse_args()
    rows.show(table(rows.measure(names(), lambda name: run(name, options), options)), options.write)


if __name__ == "__main__":
    main()
