"""Compare packed models with llama.cpp's quantised ones: size, memory, perplexity, speed of generation and prompts.

llama.cpp must be installed in a separate virtual environment by ``pip install llama-cpp-python``; the GGUF files are
made there from the model's own by ``quantised_worker.py convert``. Every row runs in a separate process, one at a
time, with the same test tokens and as many threads as there are cores.

    python scripts/bench/quantised.py --llama venv-llama/bin/python --test test.txt --max-windows 32 \
        --models "dense, float32=out/smollm2-135m" "50 %, 8 bits=out/packed-50-8" --gguf Q8_0=out/q8_0.gguf
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import rows
from peers import perplexity_of
from rows import Record

from lit_prune.pruning.progress import peak_memory
from lit_prune.runtime.model_speed import GENERATED, PROMPT, START, tokens_per_second, weight_bytes
from lit_prune.training import LitCausalLM, TextDataModule

WORKER = Path(__file__).with_name("quantised_worker.py")


def run(name: str, options: argparse.Namespace) -> Record:
    """Measure one model: in this process, or llama.cpp's in one of its own environment."""
    models, files = named(options.models), named(options.gguf)
    if name in models:
        module = LitCausalLM(str(models[name]), dtype="bfloat16" if name.endswith("bfloat16") else "float32")
        module.configure_model()
        model = module.model.eval()
        found: Record = {
            task: tokens_per_second(model, sequences, options.rounds)
            for task, sequences in (("generation", 1), ("prompt", 0))
        }
        memory = peak_memory()  # without that of the evaluation
        return {**found, "bytes": weight_bytes(model), "memory": memory, "perplexity": perplexity_of(module, options)}
    data = TextDataModule(options.model, test=options.test, seqlen=options.seqlen, max_windows=options.max_windows)
    data.setup("test")
    windows = [row for batch in data.test_dataloader() for row in batch["input_ids"].tolist()]
    numbers = [str(number) for number in (START, GENERATED, PROMPT, options.rounds)]
    command = [str(options.llama), str(WORKER), "measure", str(files[name]), *numbers]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, input=json.dumps(windows)).stdout
    return {**json.loads(output.splitlines()[-1]), "bytes": files[name].stat().st_size}


def named(pairs: list[str]) -> dict[str, Path]:
    """Return paths by name from ``NAME=PATH``."""
    return {name: Path(path) for name, _, path in (pair.rpartition("=") for pair in pairs)}


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| model | MB | peak memory MB | perplexity | generation tokens/s | prompt tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda record: -record["bytes"]):
        sizes = f"{record['bytes'] / 1e6:.0f} | {record['memory'] / 1e6:.0f}"
        rates = f"{record['generation']:.1f} | {record['prompt']:.0f}"
        lines.append(f"| {record['name']} | {sizes} | {record['perplexity']:.2f} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/quantised.jsonl")
    parser.add_argument("--llama", type=Path, required=True, help="Python that has llama-cpp-python")
    parser.add_argument("--models", nargs="+", default=[], help="NAME=FOLDER; a name that ends in bfloat16 sets it")
    parser.add_argument("--gguf", nargs="+", default=[], help="NAME=FILE of models for llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    names = [*named(options.models), *named(options.gguf)]
    rows.show(table(rows.measure(names, lambda name: run(name, options), options)), options.write)


if __name__ == "__main__":
    main()
