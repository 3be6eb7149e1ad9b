"""Persistent buffers, such as a router's bias for load balance, are part of a model: they are never left behind."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_prune.checkpoint.save import save_pruned
from lit_prune.models.experts import take_apart
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.sharding.block_store import unsharded
from lit_prune.sharding.parameters import full_model

MIXTURES = {
    "glm4_moe": {},
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}


def mixture(model_type: str) -> nn.Module:
    model = load_model("random", config={"model_type": model_type, **CONFIG, **MIXTURES[model_type]})
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(1.0, 5.0))
    return model


def biases(model: nn.Module) -> list[list[float]]:
    return [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_sharded_model_is_saved_with_its_buffers(model_type: str, one_process: None, tmp_path: Path) -> None:
    model = mixture(model_type)
    take_apart(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with unsharded(model) as (skeleton, _):
        assert biases(skeleton) == [[1.0, 2.0, 3.0, 4.0]] * 2
    with full_model(model) as whole:
        assert biases(whole) == [[1.0, 2.0, 3.0, 4.0]] * 2
        save_pruned(tmp_path / "out", whole, load_tokenizer("random"), {}, {})
    assert biases(load_model(str(tmp_path / "out"))) == [[1.0, 2.0, 3.0, 4.0]] * 2


def test_a_bitmask_export_holds_buffers(tmp_path: Path) -> None:
    save_pruned(tmp_path / "out", mixture("glm4_moe"), load_tokenizer("random"), {}, {}, to="bitmask")
    assert biases(load_model(str(tmp_path / "out"))) == [[1.0, 2.0, 3.0, 4.0]] * 2


class ScaledConfig(LlamaConfig):
    model_type = "scaled_llama"


class Scaled(LlamaForCausalLM):
    """A LLaMA with a buffer inside its blocks and one outside."""

    config_class = ScaledConfig

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.zeros(3))
        for block in self.model.layers:
            block.register_buffer("scale", torch.zeros(2))


def test_a_model_that_stays_on_disk_has_its_buffers(tmp_path: Path) -> None:
    AutoConfig.register("scaled_llama", ScaledConfig, exist_ok=True)
    AutoModelForCausalLM.register(ScaledConfig, Scaled, exist_ok=True)
    names = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Scaled(ScaledConfig(vocab_size=64, **names))
    for name, buffer in model.named_buffers():
        if name.endswith("scale"):
            buffer.fill_(7.0)
    model.save_pretrained(tmp_path / "in")
    lazy = load_model(str(tmp_path / "in"), lazy=tmp_path / "changes")
    save_pruned(tmp_path / "out", lazy, load_tokenizer("random"), {}, {})
    for found in (lazy, load_model(str(tmp_path / "out"))):
        scales = {name: buffer.tolist() for name, buffer in found.named_buffers() if name.endswith("scale")}
        assert scales == {"scale": [7.0] * 3, "model.layers.0.scale": [7.0] * 2, "model.layers.1.scale": [7.0] * 2}
