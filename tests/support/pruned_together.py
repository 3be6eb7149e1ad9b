"""What each of several processes does that prune a tiny model together: carry out plans and write what came out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_prune.allocators import AlphaPruning, Measured
from lit_prune.checkpoint.files import save_tensors, write_json
from lit_prune.checkpoint.masks import save_masks
from lit_prune.models.blocks import find_blocks
from lit_prune.models.experts import take_apart
from lit_prune.models.load import load_model
from lit_prune.ops import NM, Structured, Unstructured, collectives
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.pruning.progress import Position
from lit_prune.scorers import GBLM, Wanda
from lit_prune.sharding.parameters import full_tensor_of
from lit_prune.solvers import ADMM, SparseGPT

PLANS = {
    "wanda": PruningPlan(Unstructured(0.5), Wanda()),
    "sparsegpt": PruningPlan(NM(2, 4), solver=SparseGPT(), allocator=AlphaPruning()),
    "gblm": PruningPlan(Unstructured(0.5), GBLM()),
    "admm": PruningPlan(Unstructured(0.6), solver=ADMM(iterations=6), allocator=Measured(sequences=3), correction=0.3),
    "reconstructed": PruningPlan(Unstructured(0.6), Wanda(), reconstruction=Reconstruction(steps=6)),
    "dense": PruningPlan(Unstructured(0.5), Wanda(), propagate="dense"),
    "sequential": PruningPlan(
        Unstructured(0.6), solver=SparseGPT(), correction=0.3, residual_correction=0.4, sequential=True
    ),
    "weighed": PruningPlan(
        Structured(0.4, ["channels", "heads", "blocks"]), solver=SparseGPT(), allocator=Measured(sequences=3)
    ),
    "overflow": PruningPlan(Unstructured(0.5), Wanda()),
    "singular": PruningPlan(Unstructured(0.5), solver=SparseGPT(damping=0.0)),
}
SHAPES = {
    "llama": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "mixtral": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_local_experts": 4,
    },
}


def config(model_type: str) -> Mapping[str, object]:
    return {"model_type": model_type, "num_hidden_layers": 3, "vocab_size": 384, **SHAPES[model_type]}


def batches(sequences: int, length: int) -> list[torch.Tensor]:
    """Return batches of two sequences, the last one of what is left."""
    return list(torch.randint(384, (sequences, length), generator=torch.Generator().manual_seed(1)).split(2))


def prune_together(
    out: Path,
    plans: Sequence[str],
    model_type: str = "llama",
    sequences: int = 5,
    length: int = 64,
    shard: bool = False,
    journal: Path | None = None,
    kill_after: int | None = None,
) -> None:
    """Carry plans out, each on a new model, and write weights, masks and report of this process.

    Args:
        out: folder; a folder for each plan comes into it.
        plans: names in ``PLANS``.
        model_type: one of ``SHAPES``.
        sequences: number of calibration sequences of all processes together.
        length: of a sequence, in tokens.
        shard: use FSDP2.
        journal: folder to go on from.
        kill_after: block after whose solve the process kills itself.
    """
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")

    def kill(position: Position) -> None:
        if (position.block, position.stage) == (kill_after, "solve"):
            os._exit(9)

    for name in plans:
        model = build(name, model_type, shard)
        report = prune(
            model,
            batches(sequences, length),
            PLANS[name],
            journal_folder=journal,
            resume=journal is not None,
            on_progress=kill if kill_after is not None else None,
        )
        weights = {parameter: full_tensor_of(value).clone() for parameter, value in model.named_parameters()}
        rank = collectives.rank()
        save_tensors(out / name / f"weights{rank}.safetensors", weights)
        save_masks(out / name / f"masks{rank}.safetensors", report.masks)
        write_json(out / name / f"report{rank}.json", report.as_dict())


def build(plan: str, model_type: str, shard: bool) -> nn.Module:
    """Return a new model for a plan."""
    torch.manual_seed(0)
    # In float64, so that processes differ by much less than any two scores or sparsities do.
    model = load_model("random", torch.float64, config(model_type))
    take_apart(model)
    if plan == "overflow":
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data.fill_(1e100)
        model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0] = 1e300
    if shard:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for block in find_blocks(model):
            fully_shard(block.module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model
