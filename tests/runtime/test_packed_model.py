"""Models with packed weights, of every family: saved, opened by transformers, and back to dense weights."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.test_families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.checkpoint.masks import masks_of
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.experts import has_fused_experts, take_apart
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import PackedMask, Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.runtime import packed_layers
from lit_prune.runtime.model_speed import weight_bytes
from lit_prune.runtime.packed_layers import PackedEmbedding, PackedLinear, TiedHead
from lit_prune.runtime.packed_model import Bits, pack_model, packed_parts, unpack_model
from lit_prune.scorers import Magnitude
from support.rounding import distance, network

TOKENS = torch.arange(40).remainder(250)[None]
EXPERTS = ("mixtral", "qwen3_moe")


def pruned(model: nn.Module, sparsity: float = 0.5) -> dict[str, PackedMask]:
    return prune(model, [], PruningPlan(Unstructured(sparsity), Magnitude(), output_error=False)).masks


def random_model(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    return load_model("random", config={"model_type": model_type, **FAMILIES[model_type]}).eval()


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in EXPERTS])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_packed_model_of_every_family(model_type: str, bits: Bits, tmp_path: Path) -> None:
    model = random_model(model_type)
    masks = pruned(model)
    reference = copy.deepcopy(model)
    pack_model(model, masks, bits)
    unpacked = copy.deepcopy(model)
    unpack_model(unpacked)
    assert not packed_parts(unpacked) and type(unpacked) is type(reference)
    for name, mask in masks.items():
        assert not unpacked.get_parameter(name)[~mask.unpack()].any()
    # 40 tokens multiply unpacked tiles, in the order of torch's own products; 5 multiply packed weights.
    expected = logits(unpacked)
    assert distance(logits(model), expected) <= network(unpacked)
    few = logits(model, TOKENS[:, :5])
    # With integers, the inputs are rounded to 8 bits in each of the layers, about 1 / 127 / sqrt(3) of the largest.
    assert distance(few, expected[:, :5]) <= (network(unpacked) if bits == 16 else 0.05)
    if bits == 16:  # float16 has 11 bits, and errors add up over the layers
        assert distance(expected, logits(reference)) <= 2**-11 * len(masks)

    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened), logits(model))
    assert {name: mask.bits.tolist() for name, mask in masks_of(tmp_path).items()} == {
        name: mask.bits.tolist() for name, mask in masks.items()
    }
    assert weight_bytes(opened) < (0.65 if bits == 16 else 0.45) * weight_bytes(reference)
    dense = opened.dequantize()
    assert not packed_parts(dense) and torch.equal(logits(dense), expected)
    head, embedding = dense.get_output_embeddings(), dense.get_input_embeddings()
    tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied


@pytest.mark.parametrize("model_type", EXPERTS)
def test_fused_experts_are_refused(model_type: str) -> None:
    model = random_model(model_type)
    assert has_fused_experts(model)
    with pytest.raises(InputError, match="fused experts, which cannot be packed"):
        pack_model(model, {})
    take_apart(model)  # as the command line does
    with pytest.raises(InputError, match="fused experts, which cannot be packed"):
        pack_model(model, {})


def test_transformers_opens_and_generates_after_an_import(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    save_pruned(tmp_path / "out", model, load_tokenizer("random"), pruned(model), {}, to="packed", bits=8)
    script = (
        "import lit_prune, torch; from transformers import pipeline\n"
        f"write = pipeline('text-generation', {str(tmp_path / 'out')!r})\n"
        "print(len(write('Hello', max_new_tokens=5, return_full_text=False)[0]['generated_text']) > 0)\n"
        "print(type(write.model.lm_head).__name__)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout.split()[-2:] == ["True", "TiedHead"], ended.stderr
    assert not (tmp_path / "out" / "masks.safetensors").exists()


def test_casts_copies_and_pickles_keep_the_weights(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    pack_model(model, pruned(model), 8)
    expected = logits(model, TOKENS[:, :5])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, TOKENS[:, :5]), expected)
    half = copy.deepcopy(model).bfloat16()
    got = logits(half, TOKENS[:, :5])
    assert got.dtype == torch.bfloat16
    assert distance(got.float(), expected) < 0.1
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(other, TOKENS[:, :5]), expected)


def test_gradients_reach_the_inputs(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    pack_model(model, pruned(model), 8)
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.packed.unpack().sum(0).expand(2, -1))


def test_without_a_kernel_it_computes_the_same(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    pack_model(model, pruned(model), 16)
    expected = logits(model)
    monkeypatch.setattr(packed_layers, "kernel_on", lambda _: None)
    without = copy.deepcopy(model)
    assert distance(logits(without), expected) <= network(without) + network(tiny_model())
    assert distance(logits(without, TOKENS[:, :5]), expected[:, :5]) <= network(tiny_model())


def test_a_model_is_packed_once(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(tie_word_embeddings=True)
    pack_model(model, {}, 16, head_bits=8)  # no masks: nothing is left out
    parts = packed_parts(model)
    kinds = {type(part): part.layout.kind for part in parts.values()}
    assert kinds == {PackedLinear: "float16", PackedEmbedding: "int8"}
    assert not any(part.layout.masked for part in parts.values())
    assert isinstance(model.get_output_embeddings(), TiedHead)
    with pytest.raises(InputError, match="packed already"):
        pack_model(model, {})


def test_a_packed_model_cannot_be_pruned(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    pack_model(model, {})
    with pytest.raises(InputError, match="nothing to prune"):
        pruned(model)


Q = "model.layers.0.self_attn.q_proj"
SIZES = "its mask keeps|is needed"
"""What is said of sizes that differ: transformers gives the parts as allocated or, in older versions, as stored."""
ENTRIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "version": (lambda entry: entry.update(version=2), "of version 2: this lit-prune reads version 1"),
    "no version": (lambda entry: entry.pop("version"), "of version None"),
    "layers": (lambda entry: entry.update(layers=[1]), "without layers, by name"),
    "ties": (lambda entry: entry.update(tied={"lm_head": 1}), "without layers, by name, and tied"),
    "norm tied": (lambda entry: entry.update(tied={"model.norm": "model.embed_tokens"}), "ties 'model.norm'"),
    "masked embedding": (lambda entry: entry["layers"]["model.embed_tokens"].update(masked=True), "with a mask or 4"),
    "4-bit embedding": (lambda entry: entry["layers"]["model.embed_tokens"].update(kind="int4"), "with a mask or 4"),
    "tied to nothing": (lambda entry: entry.update(tied={"lm_head": "x"}), "ties 'lm_head' to 'x'"),
    "unknown": (lambda entry: entry["layers"].update(x=entry["layers"][Q]), "'x', which the model does not have"),
    "norm": (lambda entry: entry["layers"].update({"model.norm": entry["layers"][Q]}), "does not have"),
    "larger": (lambda entry: entry["layers"][Q].update(shape=[10**6, 32]), "larger than"),
    "kind": (lambda entry: entry["layers"][Q].update(kind="int4"), "its mask keeps|needed|as its config says"),
    "stored": (lambda entry: entry["layers"][Q].update(stored=1), SIZES),
    "unmasked": (lambda entry: entry["layers"][Q].update(masked=False), SIZES),
    "absurd": (lambda entry: entry["layers"][Q].update(stored=10**15), "too many"),
}


def packed_folder(tiny_model: Callable[..., nn.Module], folder: Path) -> Path:
    model = tiny_model(tie_word_embeddings=True)
    return save_pruned(folder / "out", model, load_tokenizer("random"), pruned(model), {}, to="packed", bits=8)


@pytest.mark.parametrize(("change", "said"), ENTRIES.values(), ids=ENTRIES)
def test_a_damaged_entry_is_refused_in_one_line(
    change: Callable[[dict], object], said: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    folder = packed_folder(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said) as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)


def test_ten_thousand_damages_are_refused_or_harmless(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    """One or two flipped bits in a mask or a scale: refused, or another weight of the same size."""
    model = tiny_model()
    pack_model(model, pruned(model), 8)
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    generator = torch.Generator().manual_seed(0)
    packed, x = layer.packed, torch.randn(1, layer.in_features)
    refused = 0
    for _ in range(10_000):
        damaged = copy.copy(packed)
        part = ("mask", "scales")[int(torch.randint(2, (), generator=generator))]
        tensor = getattr(packed, part).clone()
        flat = tensor.view(torch.uint8).reshape(-1)
        at = torch.randint(len(flat), (int(torch.randint(1, 3, (), generator=generator)),), generator=generator)
        flat[at] ^= 1 << torch.randint(8, at.shape, generator=generator).to(torch.uint8)
        object.__setattr__(damaged, part, tensor)
        try:
            layer.set(damaged)
        except InputError:
            refused += 1
        else:
            layer(x)
    assert 3_000 < refused < 10_000


@pytest.mark.parametrize("part", ["values", "mask", "scales"])
def test_a_file_without_a_part_or_cut_is_refused(
    part: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    folder = packed_folder(tiny_model, tmp_path)
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = f"{Q}.{part}"
    for change in ({}, {name: tensors[name].flatten()[:-1]}):
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file({**rest, **change}, file, {"format": "pt"})
        with pytest.raises(InputError):
            load_model(str(folder))
