"""Coupled units of all families: found, removed, and the smaller model compared with the masked one."""

from pathlib import Path

import pytest
import torch
from models.test_families import FAMILIES, windows
from torch import Tensor, nn

from lit_prune.calibration.dependencies import find_couplings
from lit_prune.errors import InputError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.coupling import Coupling, Kept
from lit_prune.models.experts import apart
from lit_prune.models.load import load_model
from lit_prune.models.shrink import shrink
from lit_prune.sharding.block_store import store_of
from lit_prune.sharding.parameters import read_weight
from support.rounding import distance, network

# Units, and what a unit consists of, worked out from the configs: 4 heads of 16 with 2 key-value heads, or with 4.
_GROUPED = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
HEADS: dict[str, tuple[int, dict[str, int]] | None] = {
    "phi3": (2, {"qkv_proj": 64}),
    "opt": (4, {"q_proj": 16, "k_proj": 16, "v_proj": 16}),
    "gpt2": (4, {"c_attn": 48}),
    "gpt_neox": (4, {"query_key_value": 48}),
    "bloom": (4, {"query_key_value": 48}),
    "falcon": (2, {"query_key_value": 64}),
    "olmo2": None,  # the norms of its queries and keys are over all heads
}
CHANNELS = {
    "phi3": (128, {"gate_up_proj": 2}),
    "opt": (128, {"fc1": 1}),
    "gpt2": (256, {"c_fc": 1}),
    "gpt_neox": (128, {"dense_h_to_4h": 1}),
    "bloom": (256, {"dense_h_to_4h": 1}),
    "falcon": (256, {"dense_h_to_4h": 1}),
    "mixtral": (128, {"gate_up_proj": 2}),
    "qwen3_moe": (64, {"gate_up_proj": 2}),
}
NO_CONFIG = {
    "channels": {"bloom"},
    "heads": {"opt", "gpt2", "gpt_neox", "bloom", "falcon", "stablelm"},
}
"""Families whose configs cannot express fewer of a unit: sizes are tied to each other."""


def random_model(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    return load_model("random", config={"model_type": model_type, **FAMILIES[model_type]}).eval()


def couplings(model: nn.Module) -> list[Coupling]:
    return find_couplings(model, find_blocks(model), store_of(model))


def parts(coupling: Coupling) -> tuple[int, dict[str, int]]:
    return coupling.units, {p.target.name.rpartition(".")[2]: p.rows.shape[1] for p in coupling.producers}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_units_are_found_in_every_family(model_type: str) -> None:
    model = random_model(model_type)
    with apart(model):
        found = couplings(model)
    for block in range(2):
        heads = [parts(c) for c in found if c.kind == "heads" and c.consumer.block == block]
        expected = HEADS.get(model_type, (2, _GROUPED))
        assert heads == ([] if expected is None else [expected])
        channels = [parts(c) for c in found if c.kind == "channels" and c.consumer.block == block]
        experts = 4 if model_type in ("mixtral", "qwen3_moe") else 1
        assert channels == [CHANNELS.get(model_type, (128, {"gate_proj": 1, "up_proj": 1}))] * experts
    for coupling in found:
        for target, indices, size in [(coupling.consumer, coupling.columns, 1)] + [
            (p.target, p.rows, 0) for p in coupling.producers
        ]:
            assert sorted(indices.flatten().tolist()) == list(range(target.shape[size]))


@torch.no_grad()
def remove_quarter(model: nn.Module, kind: str) -> dict[str, Kept]:
    """Zero a quarter of the units in the layers that read them, chosen at random, and return what is kept."""
    kept: dict[str, Kept] = {}
    generator = torch.Generator().manual_seed(0)
    with apart(model):
        for coupling in couplings(model):
            if coupling.kind == kind:
                units = torch.ones(coupling.units, dtype=torch.bool)
                units[torch.randperm(coupling.units, generator=generator)[: -(-coupling.units // 4)]] = False
                read_weight(coupling.consumer.module)[:, coupling.columns[~units].flatten()] = 0.0
                kept |= coupling.keep(units)
    return kept


@pytest.mark.parametrize("kind", ["channels", "heads"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_smaller_model_computes_what_the_masked_one_does(model_type: str, kind: str, tmp_path: Path) -> None:
    if kind == "heads" and HEADS.get(model_type, ()) is None:
        return
    model, batch = random_model(model_type), windows("test", 2)
    kept = remove_quarter(model, kind)
    if model_type in NO_CONFIG[kind]:
        with pytest.raises(InputError, match=f"the config of {model_type} cannot express"):
            shrink(model, kept)
        return
    with torch.no_grad():
        masked: Tensor = model(input_ids=batch).logits
        small = shrink(model, kept)
        assert distance(small(input_ids=batch).logits, masked) <= network(model)
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert removed >= sum(read_weight(model.get_submodule(n)).numel() for n in kept if "expert" not in n) / 4
    small.save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.no_grad():
        again = load_model(str(tmp_path))
        assert torch.equal(again(input_ids=batch).logits, small(input_ids=batch).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_are_left_out(model_type: str) -> None:
    model, batch = random_model(model_type), windows("test", 2)
    block = find_blocks(model)[0].module
    with torch.no_grad(), apart(model):
        for name, parameter in block.named_parameters():
            if "norm" not in name and "ln" not in name:
                parameter.zero_()
        masked = model(input_ids=batch).logits
    small = shrink(model, {}, [0])
    with torch.no_grad():
        assert distance(small(input_ids=batch).logits, masked) <= network(model)
    assert len(find_blocks(small)) == 1


def test_a_smaller_model_that_computes_something_else_is_refused() -> None:
    model = random_model("llama")
    kept = remove_quarter(model, "channels")
    read_weight(model.get_submodule("model.layers.0.mlp.down_proj")).add_(1.0)  # no unit is without effect any more
    with pytest.raises(InputError, match="differs from the one with removed units at zero"):
        shrink(model, kept)


def test_tied_embeddings_stay_tied() -> None:
    model = load_model("random", config={"model_type": "llama", **FAMILIES["llama"], "tie_word_embeddings": True})
    small = shrink(model, remove_quarter(model, "channels"))
    assert small.get_parameter("lm_head.weight") is small.get_parameter("model.embed_tokens.weight")
