"""GPU benchmarks: pruning a LLaMA-7B (seconds per stage, peak memory), packed and 2:4 layers, masked fine-tuning.

The models have random weights in bfloat16 and their real shapes. Pruning keeps the 7 B model in CPU memory and
processes one block at a time on the GPU; the ratio is relative to the counted floating-point operations at the GPU's
rate of bfloat16 products. Fine-tuning compares tokens per second and peak memory of a pruned model of 1.1 B parameters
with those of the same model dense. Packed layers multiply one token; see ``gpu_layers.py``. To try out the script, use
``--layers 2 --hidden 256 --device cpu --sequences 2 --seqlen 64 --steps 4``.

    python scripts/bench/gpu.py
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from typing import Any

import rows
import torch
from engine import PLANS, product_rate
from gpu_layers import gain_lines, time_layer
from lightning.pytorch import Callback, Trainer
from rows import Record

from lit_prune.callbacks import KeepMasks, Prune
from lit_prune.models.load import load_model
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.preflight import preflight
from lit_prune.runtime.sparse_layers import measure_speed
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, TextDataModule

METHODS = ("Wanda", "SparseGPT", "ADMM")
PACKED = [f"packed, {layer}, {dtype}" for layer in ("attention", "MLP") for dtype in ("float16", "bfloat16")]
NAMES = [*(f"prune, {method}" for method in METHODS), *PACKED, "2:4 layers", "train, masked", "train, dense"]


class Clock(Callback):
    """Records the end time of each training step."""

    def __init__(self) -> None:
        """Initialize with no times."""
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Record the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def llama(options: argparse.Namespace, hidden: int, layers: int) -> dict[str, Any]:
    """Return the config of a random Llama, smaller if the options specify that."""
    hidden, layers = options.hidden or hidden, options.layers or layers
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": {4096: 11008, 2048: 5632}.get(hidden, 2 * hidden),
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
    }


def run(name: str, options: argparse.Namespace) -> Record:
    """Measure one row."""
    kind, _, detail = name.partition(", ")
    if kind == "prune":
        return pruning(detail, options)
    if kind == "packed":
        return packed_layer(detail, options)
    return layers(options) if kind == "2:4 layers" else training(detail, options)


def pruning(method: str, options: argparse.Namespace) -> Record:
    """Prune the 7 B model with a method."""
    model: Any = load_model("random", torch.bfloat16, llama(options, 4096, 32))
    tokens = torch.randint(32000, (options.sequences, options.seqlen), generator=torch.Generator().manual_seed(0))
    batches = list(tokens.split(options.batch_size))
    plan = replace(PLANS[method], device=options.device)
    expected = preflight(model, batches, plan)
    assert expected is not None
    rate = product_rate(model, options)
    start = time.perf_counter()
    report = prune(model, batches, plan)
    seconds = time.perf_counter() - start
    ratio = seconds / (expected.work.total / rate)
    figures = {"seconds": seconds, "stages": report.seconds, "rate": rate, "ratio": ratio, "memory": report.peak_memory}
    return {**figures, "foreseen": [expected.seconds, expected.memory]}


def packed_layer(detail: str, options: argparse.Namespace) -> Record:
    """Time a layer of the 7 B model with one token, packed and dense: 4,096 x 4,096, or 4,096 x 11,008 of the MLP."""
    layer, dtype = detail.split(", ")
    config = llama(options, 4096, 32)
    shape = (config["hidden_size"], config["hidden_size" if layer == "attention" else "intermediate_size"])
    return {"shape": shape, **time_layer(shape, getattr(torch, dtype), torch.device(options.device))}


def layers(options: argparse.Namespace) -> Record:
    """Time the 7 B model's layers at 2:4, dense and sparse."""
    model = load_model("random", torch.bfloat16 if options.device != "cpu" else None, llama(options, 4096, 1))
    report = prune(model, [], PruningPlan(NM(2, 4), Magnitude(), output_error=False))
    found = measure_speed(model.to(options.device), {n: m.to(options.device) for n, m in report.masks.items()})
    return {"layers": [f"{s.shape}, {s.tokens} tokens, {s.form}: {s.verdict}" for s in found]}


def training(kind: str, options: argparse.Namespace) -> Record:
    """Fine-tune the 1.1 B model, either pruned with masks kept, or dense."""
    module = LitCausalLM("random", "bfloat16", config=llama(options, 2048, 22), gradient_checkpointing=True)
    data = TextDataModule("random", dataset="embedded", seqlen=options.seqlen, batch_size=options.batch_size)
    clock = Clock()
    masks = [Prune(PruningPlan(Unstructured(0.5), Magnitude(), output_error=False)), KeepMasks()]
    trainer = Trainer(
        accelerator="cpu" if options.device == "cpu" else "gpu",
        devices=1,
        precision="bf16-true",
        max_steps=options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[*(masks if kind == "masked" else []), clock],
    )
    trainer.fit(module, data)
    steps = clock.ends[options.steps // 10 :]  # the first steps are warm-up
    seconds = steps[-1] - steps[0]
    tokens = (len(steps) - 1) * options.batch_size * options.seqlen
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "memory": memory}


def table(records: list[Record]) -> str:
    """Return the records as Markdown."""
    lines = []
    for record in records:
        lines.append(f"- **{record['name']}**")
        for key, value in record.items():
            if key in ("layers", "gains"):
                lines += [f"    - {line}" for line in (value if key == "layers" else gain_lines(value))]
            elif key not in ("name", "seed"):
                lines.append(f"    - {key}: {value}")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the figures."""
    parser = rows.parser(__doc__, "out/bench/gpu.jsonl")
    parser.set_defaults(seqlen=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500, help="of fine-tuning")
    parser.add_argument("--hidden", type=int, help="a smaller model, to try the script")
    parser.add_argument("--layers", type=int, help="fewer blocks, to try the script")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # in the processes that measure
    rows.show(table(rows.measure(NAMES, lambda name: run(name, options), options)), options.write)


if __name__ == "__main__":
    main()
