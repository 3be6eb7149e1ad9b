"""Prune a model with one method and write it, with seconds and peak memory; started by peers.py."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

SPARSITY = 0.5


def ours(model: Any, tokens: torch.Tensor, method: str, half: bool) -> None:
    """Prune with lit-prune, in batches of two sequences, and keep freed memory, as its command line does."""
    from contextlib import nullcontext
    from functools import partial

    from lit_prune.malloc import keep_freed_memory
    from lit_prune.ops import Unstructured
    from lit_prune.pruning import PruningPlan, prune
    from lit_prune.scorers import Wanda
    from lit_prune.solvers import SparseGPT

    keep_freed_memory()
    how: Any = {"scorer": Wanda()} if method == "Wanda" else {"solver": SparseGPT()}
    context: Any = partial(torch.autocast, "cpu", dtype=torch.bfloat16) if half else nullcontext
    plan = PruningPlan(Unstructured(SPARSITY), output_error=False, **how)
    prune(model, tokens.split(2), plan, forward_context=context)


def theirs(model: Any, tokens: torch.Tensor, method: str) -> None:
    """Prune with llm-compressor, as in its examples."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = WandaPruningModifier if method == "Wanda" else SparseGPTModifier
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    oneshot(
        model=model,
        dataset=data,
        recipe=[kind(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])],
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )


def main() -> None:
    """Prune, and write the folder and the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "theirs"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--half", action="store_true", help="forward passes in bfloat16")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = torch.tensor(json.loads(options.tokens.read_text()))
    start = time.perf_counter()
    if options.who == "ours":
        ours(model, tokens, options.method, options.half)
    else:
        theirs(model, tokens, options.method)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    model.save_pretrained(options.output)
    (options.output / "figures.json").write_text(json.dumps({"seconds": seconds, "peak_memory": peak}))


if __name__ == "__main__":
    main()
