"""GGUF files: a complete one is loaded to the bit, and metadata are checked against the tensors first."""

import json
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import gguf as ours
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")

HEADS = 4
METADATA = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 3,
    "feed_forward_length": 48,
    "head_count": HEADS,
    "head_count_kv": HEADS,
    "layer_norm_rms_eps": 1e-6,
    "rope_freq_base": 10000.0,
    "vocab_size": 384,
    "key_length": 8,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, model: nn.Module, **changes: float) -> str:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {**METADATA, **changes}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "ba", *map(chr, range(256, 635)), "<|endoftext|>"])
    writer.add_token_types([1] * 384)
    writer.add_token_merges(["a b", "b a"])  # older versions of transformers take a single one for a text
    for name, weight in model.state_dict().items():
        values = weight
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp orders the rows of a head in pairs
            values = weight.reshape(HEADS, 2, -1, 32).transpose(1, 2).reshape(weight.shape)
        for long, short in NAMES.items():
            name = name.replace(long, short)  # noqa: PLW2901
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model(num_key_value_heads=HEADS)


def test_a_complete_file_is_loaded_to_the_bit(model: nn.Module, tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path / "model.gguf", model))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    load_tokenizer(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_count": 2}, r"its llama\.block_count is 2, and it has tensors of 3 blocks"),
        ({"block_count": 0}, r"its llama\.block_count is 0, and it has tensors of 3 blocks"),
        ({"block_count": 2**31 - 1}, r"its llama\.block_count is 2,147,483,647, and it has tensors of 3 blocks"),
        ({"embedding_length": 2**30}, r"its llama\.embedding_length is 1,073,741,824, and .* larger than 384"),
        ({"feed_forward_length": 2**30}, r"its llama\.feed_forward_length is 1,073,741,824, and"),
        ({"vocab_size": 2**31}, r"its llama\.vocab_size is 2,147,483,648, and"),
        ({"key_length": 2**30}, r"its llama\.attention\.key_length is 1,073,741,824, and"),
        ({"feed_forward_length": 384}, r"its metadata describe 147,\d{3} weights, and it has 5\d,\d{3}"),
        ({"head_count": 3}, "its config has an invalid value .* correct it, or download the model again"),
    ],
    ids=str,
)
def test_metadata_that_differ_from_the_tensors_are_refused(
    changes: dict[str, float], said: str, model: nn.Module, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", model, **changes)
    with pytest.raises(InputError, match=said) as raised:
        load_model(file)
    assert file in str(raised.value) and "\n" not in str(raised.value)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def cut_by_a_byte(content: bytes) -> bytes:
    return content[:-1]


def have_another_magic(content: bytes) -> bytes:
    return b"GGUX" + content[4:]


def have_no_metadata(content: bytes) -> bytes:
    return content[:16] + struct.pack("<Q", 0) + content[24:]


def have_an_endless_list(content: bytes) -> bytes:
    length = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    return content[:length] + struct.pack("<Q", 2**62) + content[length + 8 :]


DAMAGES = [cut, cut_by_a_byte, have_another_magic, have_no_metadata, have_an_endless_list]


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_to_be_downloaded_again(
    damage: Callable[[bytes], bytes], load: Callable[[str], object], model: nn.Module, tmp_path: Path
) -> None:
    file = Path(write(tmp_path / "model.gguf", model))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"is not a complete GGUF file \(.*\); download it again") as raised:
        load(str(file))
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_adapter_beside_a_file_does_not_redirect_it(
    load: Callable[[str], object], model: nn.Module, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", model)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(InputError, match=r"the folder has an adapter_config\.json"):
        load(file)


def test_the_absence_of_gguf_is_told(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "model.gguf", model)
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    loader = import_module("transformers.modeling_gguf_pytorch_utils")
    monkeypatch.setattr(loader, "is_gguf_available", lambda *_, **__: False)
    with pytest.raises(InputError, match="gguf"):
        load_model(file)
