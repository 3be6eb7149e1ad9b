"""Scaling of the cost of pruning with processes, sequences, blocks and width, on random Llamas.

Every figure is the duration in seconds of one run in separate processes with one thread each. The exponent of a series
is the slope of log(seconds) over log(size), by least squares. Two processes are started as by torchrun, with gloo.
Their result is compared with that of one process in float64, on two blocks: in float32, or after more blocks, a
different order of summation is sufficient to prune other weights if many are nearly equally good.

    python scripts/bench/scaling.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rows
import torch
from rows import Record
from torch import distributed

from lit_prune.malloc import keep_freed_memory
from lit_prune.models.load import load_model
from lit_prune.ops import Unstructured, collectives
from lit_prune.pruning import PruningPlan, prune
from lit_prune.scorers import Wanda
from lit_prune.solvers import ADMM, SparseGPT

PLANS = {
    "Wanda": PruningPlan(Unstructured(0.5), Wanda(), output_error=False),
    "SparseGPT": PruningPlan(Unstructured(0.5), solver=SparseGPT(), output_error=False),
    "ADMM": PruningPlan(Unstructured(0.5), solver=ADMM(), output_error=False),
}
USUAL = {"processes": 1, "sequences": 16, "blocks": 4, "hidden": 512}
SERIES = {
    "processes": (1, 2),
    "sequences": (8, 16, 32, 64),
    "blocks": (2, 4, 8, 16, 30),
    "hidden": (256, 512, 1024, 2048),
}


def cases() -> dict[str, dict[str, Any]]:
    """Return the cases to measure: for each method and series, one size varies and the others have their defaults."""
    found = {}
    for method in PLANS:
        for name, sizes in SERIES.items():
            for size in sizes:
                case = {**USUAL, name: size, "method": method, "series": name, "size": size}
                if name == "processes":
                    case["sequences"] = 32  # as in the other benchmarks
                found[f"{method}, {name} {size}"] = case
    return found


def run(name: str, options: argparse.Namespace) -> Record:
    """Start the processes of a case, and return their seconds; compare several with one."""
    case = cases()[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outputs = [options.work / f"{name}.{rank}.json" for rank in range(case["processes"])]
    options.work.mkdir(parents=True, exist_ok=True)
    started = []
    for rank, output in enumerate(outputs):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(len(outputs))}
        command = [sys.executable, __file__, "--worker", json.dumps(case), "--output", str(output)]
        started.append(subprocess.Popen(command, env=environment))
    for process in started:
        process.wait()
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process of {name} failed")
    figures = [json.loads(output.read_text()) for output in outputs]
    seconds = max(figure["seconds"] for figure in figures)
    return {**case, "seconds": seconds, "stages": figures[0]["stages"], "logits": figures[0]["logits"]}


def work(case: dict[str, Any], output: Path) -> None:
    """Prune a random model in this process and write the seconds, and a sample of its logits."""
    keep_freed_memory()
    torch.set_num_threads(1)
    if case["processes"] > 1:
        distributed.init_process_group("gloo")
    tokens = torch.randint(1024, (case["sequences"], 512), generator=torch.Generator().manual_seed(0))
    model = random_model(case, torch.float32)
    with torch.no_grad():
        model(input_ids=tokens[:1])
    if case["processes"] > 1:
        distributed.barrier()
    start = time.perf_counter()
    report = prune(model, tokens.split(8), PLANS[case["method"]])
    seconds = time.perf_counter() - start
    logits = sample_of_logits(case, tokens[:8]) if case["series"] == "processes" else None
    output.write_text(json.dumps({"seconds": seconds, "stages": report.seconds, "logits": logits}))
    assert collectives.world_size() == case["processes"]


def random_model(case: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return the same random Llama in every process."""
    torch.manual_seed(0)
    width = case["hidden"]
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_attention_heads": width // 64,
        "num_hidden_layers": case["blocks"],
        "vocab_size": 1024,
    }
    return load_model("random", dtype, config)


def sample_of_logits(case: dict[str, Any], tokens: torch.Tensor) -> list[float]:
    """Return a sample of the logits of a model with two blocks, pruned in float64 with these tokens."""
    model = random_model({**case, "blocks": 2}, torch.float64)
    prune(model, [tokens], PLANS[case["method"]])
    with torch.no_grad():
        return model(input_ids=tokens[:1, :64]).logits.flatten()[::64].tolist()


def table(records: list[Record]) -> str:
    """Return the records as Markdown: the seconds of each method and series, and the conclusion."""
    lines = ["| method | series | seconds | |", "|---|---|---|---|"]
    for method in PLANS:
        for series in SERIES:
            mine = [r for r in records if (r["method"], r["series"], r["seed"]) == (method, series, records[0]["seed"])]
            mine.sort(key=lambda record: record["size"])
            if len(mine) < 2:
                continue
            seconds = ", ".join(f"{r['size']}: {r['seconds']:.1f}" for r in mine)
            lines.append(f"| {method} | {series} | {seconds} | {_verdict(series, mine)} |")
    return "\n".join(lines)


def _verdict(series: str, records: list[Record]) -> str:
    if series == "processes":
        one, two = (torch.tensor(r["logits"], dtype=torch.float64) for r in records)
        apart = ((one - two).norm() / one.norm()).item()
        faster = records[0]["seconds"] / records[1]["seconds"]
        return (
            f"**{faster:.2f}** times as fast; logits {f'apart by {apart:.0e} of their norm' if apart else 'the same'}"
        )
    x, y = ([math.log(r[key]) for r in records] for key in ("size", "seconds"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return f"exponent **{slope:.2f}**"


def main() -> None:
    """Run the missing cases, then print the table."""
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[4]))
        return
    parser = rows.parser(__doc__, "out/bench/scaling.jsonl")
    parser.add_argument("--work", type=Path, default=Path("out/bench/scaling"), help="folder for passing files")
    options = parser.parse_args()
    rows.show(table(rows.measure(list(cases()), lambda name: run(name, options), options)), options.write)


if __name__ == "__main__":
    main()
