"""Work and memory of pruning Llama models of 1, 7 and 70 billion weights, from their configs, without allocating them.

python scripts/bench/sizing.py
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan
from lit_prune.pruning.memory import count_gradient_memory, count_memory
from lit_prune.pruning.preflight import count_work
from lit_prune.scorers import GBLM, Wanda
from lit_prune.solvers import ADMM, SparseGPT

MODELS = {
    "Llama 3.2 1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    },
    "Llama 2 7B": {
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
        **{"num_attention_heads": 32, "num_key_value_heads": 32},
    },
    "Llama 2 70B": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 32000},
        **{"num_attention_heads": 64, "num_key_value_heads": 8},
    },
}
HALF = Unstructured(0.5)
PLANS = {
    "Wanda": PruningPlan(HALF, Wanda(), output_error=False, sequential=True),
    "GBLM": PruningPlan(HALF, GBLM(), output_error=False, sequential=True),
    "SparseGPT": PruningPlan(HALF, solver=SparseGPT(), sequential=True),
    "SparseGPT, two passes": PruningPlan(HALF, solver=SparseGPT(), sequential=False),
    "best": PruningPlan(HALF, solver=ADMM(), correction=0.3, residual_correction=0.6, sequential=True),
}
SEQUENCES, SEQLEN = 128, 2048


def main() -> None:
    """Print a row for every model and plan."""
    print(
        "| model | weights, GB | block, GB | plan | beyond the model, GB | hidden on CPU, GB | gradients, GB | PFLOP |"
    )
    print("|---|---|---|---|---|---|---|---|")
    batches = [torch.empty(1, SEQLEN, dtype=torch.int64, device="meta")] * SEQUENCES
    for name, values in MODELS.items():
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values), dtype=torch.bfloat16)
        model.tie_weights()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        for plan_name, plan in PLANS.items():
            blocks, targets = plan.find_targets(model)
            mine = [target for target in targets if target.block == 0]
            block = sum(2 * prod(target.shape) for target in mine)
            kinds = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")
            groups = [[t.name for t in mine if t.name.rpartition(".")[2] in kind.split()] for kind in kinds]
            work = count_work(model, blocks, targets, groups, batches, plan)
            memory = count_memory(model, mine, groups, batches, plan)
            offloaded = count_memory(model, mine, groups, batches, replace(plan, device="cpu", hidden_device="meta"))
            gradients = count_gradient_memory(targets, plan)
            row = [f"{weights / 1e9:.1f}", f"{block / 1e9:.2f}", plan_name, f"{memory / 1e9:.1f}"]
            print(
                "|",
                " | ".join(
                    [name, *row, f"{offloaded / 1e9:.1f}", f"{gradients / 1e9:.0f}", f"{work.total / 1e15:,.1f}"]
                ),
                "|",
            )


if __name__ == "__main__":
    main()
