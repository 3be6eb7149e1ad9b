"""Peak memory of pruning random Llamas of 1.1 and 6.7 B parameters in bfloat16, in memory or offloaded to disk.

Each row is the peak resident memory of a separate process, as reported by the system, from its start to the pruned
model (in memory) or to the written folder (from disk to disk); freed memory is returned to the system. Of the larger
model, only the first blocks are pruned; one process stops halfway, another one resumes its journal.

    python scripts/bench/memory.py
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import rows
import torch
from accelerate import init_empty_weights
from rows import Record
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.checkpoint.save import save_pruned
from lit_prune.malloc import give_back_freed_memory
from lit_prune.models.load import load_model
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.preflight import preflight
from lit_prune.pruning.progress import Position, peak_memory
from lit_prune.solvers import SparseGPT

SMALL, LARGE = "1.1 B", "6.7 B"
SHAPES: dict[str, dict[str, Any]] = {
    SMALL: {  # TinyLlama
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
        **{"num_attention_heads": 32, "num_key_value_heads": 4},
    },
    LARGE: {  # Llama 7B
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
        **{"num_attention_heads": 32, "num_key_value_heads": 32},
    },
}
IN_MEMORY, FROM_DISK, STOPPED, RESUMED = "in memory", "from disk to disk", "from disk, stopped", "from disk, resumed"
ROWS = {
    **{f"{SMALL} {how}": (SMALL, how) for how in (IN_MEMORY, FROM_DISK)},
    **{f"{LARGE} {how}": (LARGE, how) for how in (STOPPED, RESUMED)},
}


class Stopped(Exception):  # noqa: N818 - a signal, not an error
    """Ends a run in the middle."""


def make_model(folder: Path, shape: str) -> None:
    """Write a random bfloat16 model, one file per block, unless it exists."""
    if (folder / "config.json").is_file():
        return
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16")
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for prefix in ("model.embed_tokens.", *(f"model.layers.{i}." for i in range(config.num_hidden_layers)), ""):
        names = [name for name in model.state_dict() if name.startswith(prefix) and name not in files]
        values = {name: _random(model.get_parameter(name).shape, generator) for name in names}
        file = f"model-{prefix or 'rest.'}safetensors"
        files |= dict.fromkeys(names, file)
        save_file(values, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.normal_(0, 0.02, generator=generator) if len(shape) > 1 else values.fill_(1.0)


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune and return the peak memory, as a multiple of the size of the weights."""
    give_back_freed_memory()
    shape, how = ROWS[name]
    folder, lazy = options.work / shape, how != IN_MEMORY
    model: Any = load_model(str(folder), lazy=options.work / f"{shape} changes" if lazy else None)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tokens = torch.randint(32000, (options.sequences, options.seqlen), generator=torch.Generator().manual_seed(0))
    batches = list(tokens.split(options.batch_size))
    blocks = options.large_blocks if shape == LARGE else SHAPES[shape]["num_hidden_layers"]
    included = [f"*.layers.{index}.*" for index in range(blocks)]
    plan = PruningPlan(Unstructured(0.5), solver=SparseGPT(), output_error=False, include=included)
    expected = preflight(model, batches, plan)

    def stop_halfway(position: Position) -> None:
        if how == STOPPED and position.block == blocks // 2:
            raise Stopped

    start = time.perf_counter()
    with suppress(Stopped):
        report = prune(
            model,
            batches,
            plan,
            on_progress=stop_halfway,
            journal_folder=options.work / "journal" if shape == LARGE else None,
            resume=how == RESUMED,
        )
        if lazy:
            save_pruned(options.work / "pruned", model, None, report.masks, {}, overwrite=True)
    peak = peak_memory()
    assert peak is not None and expected is not None
    seconds = time.perf_counter() - start
    return {"weights": weights, "peak": peak, "ratio": peak / weights, "foreseen": expected.memory, "seconds": seconds}


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = ["| model | weights GB | peak GB | ratio | seconds |", "|---|---|---|---|---|"]
    for record in records:
        sizes = (f"{record[name] / 1e9:.2f}" for name in ("weights", "peak"))
        cells = (record["name"], *sizes, f"**{record['ratio']:.2f}**", f"{record['seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/memory.jsonl")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/bench/memory"), help="folder for the models")
    parser.add_argument("--large-blocks", type=int, default=8, help="number of the larger model's blocks to prune")
    options = parser.parse_args()
    if not options.only and not options.list:
        for shape in {ROWS[name][0] for name in ROWS if any(fnmatchcase(name, match) for match in options.match)}:
            make_model(options.work / shape, shape)
    rows.show(table(rows.measure(list(ROWS), lambda name: run(name, options), options, False)), options.write)


if __name__ == "__main__":
    main()
