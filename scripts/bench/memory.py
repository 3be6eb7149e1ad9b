"""Peak memory of pruning a random Llama of 1.1 B parameters in bfloat16, loaded into memory or offloaded to disk.

Each row is the peak resident memory of a separate process, as reported by the system, from its start to the pruned
model (in memory) or to the written folder (from disk to disk); freed memory is returned to the system.

    python scripts/bench/memory.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import rows
import torch
from rows import Record
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.checkpoint.save import save_pruned
from lit_prune.malloc import give_back_freed_memory
from lit_prune.models.load import load_model
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.preflight import preflight
from lit_prune.pruning.progress import peak_memory
from lit_prune.solvers import SparseGPT

NAMES = ("in memory", "from disk to disk")


def make_model(folder: Path) -> None:
    """Write a random model with the shape of TinyLlama-1.1B, unless it exists."""
    if not (folder / "config.json").is_file():
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32000,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="500MB")


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune and return the peak memory, as a multiple of the size of the weights."""
    give_back_freed_memory()
    folder, lazy = options.work / "model", name == NAMES[1]
    model: Any = load_model(str(folder), lazy=options.work / "changes" if lazy else None)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tokens = torch.randint(32000, (options.sequences, options.seqlen), generator=torch.Generator().manual_seed(0))
    batches = list(tokens.split(options.batch_size))
    plan = PruningPlan(Unstructured(0.5), solver=SparseGPT(), output_error=False)
    expected = preflight(model, batches, plan)
    report = prune(model, batches, plan)
    if lazy:
        save_pruned(options.work / "pruned", model, None, report.masks, {}, overwrite=True)
    peak = peak_memory()
    assert peak is not None and expected is not None
    return {"weights": weights, "peak": peak, "ratio": peak / weights, "foreseen": expected.memory}


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = ["| model | weights GB | peak GB | ratio |", "|---|---|---|---|"]
    for record in records:
        sizes = (f"{record[name] / 1e9:.2f}" for name in ("weights", "peak"))
        cells = (record["name"], *sizes, f"**{record['ratio']:.2f}**")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/memory.jsonl")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/bench/memory"), help="folder for the models")
    options = parser.parse_args()
    if not options.only:
        make_model(options.work / "model")
    rows.show(table(rows.measure(NAMES, lambda name: run(name, options), options, False)), options.write)


if __name__ == "__main__":
    main()
