"""Saving, packing and running models that are on the device."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.checkpoint.bitmask import read_bitmask
from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import PackedMask, Structured, Unstructured
from lit_prune.pruning import PruningPlan, Quantize, prune
from lit_prune.runtime.packed_layers import PackedLinear
from lit_prune.runtime.packed_model import pack_model, unpack_model
from lit_prune.runtime.sparse_layers import measure_speed
from lit_prune.scorers import Wanda
from support.mock_device import MOCK
from support.rounding import distance, network
from support.training import LLAMA

IDS = torch.arange(24).remainder(250)[None]


WANDA = PruningPlan(Unstructured(0.5), Wanda())


@cache
def pruned_once(plan: PruningPlan) -> tuple[nn.Module, dict[str, PackedMask]]:
    torch.manual_seed(0)
    model = load_model("random", config=LLAMA).eval().to(MOCK)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
    return model, prune(model, [tokens], plan).masks


def pruned(plan: PruningPlan = WANDA) -> tuple[nn.Module, dict[str, PackedMask]]:
    """Return a model on the device, and its masks."""
    model, masks = pruned_once(plan)
    return copy.deepcopy(model), masks


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids.to(next(model.parameters()).device)).logits.cpu()


def test_layers_are_not_timed_without_compressed_rows() -> None:
    model, masks = pruned()
    with pytest.raises(InputError, match=rf"the model is on {MOCK}\S*: torch has no compressed rows there; time the"):
        measure_speed(model, masks, tokens=[1], seconds=0.0)


@pytest.mark.parametrize("to", ["hf", "bitmask", "packed"])
def test_saved_models(to: str, tmp_path: Path) -> None:
    model, masks = pruned()
    bound = network(model)
    save_pruned(tmp_path / "out", model, load_tokenizer("random"), masks, {}, to=to)
    assert {parameter.device.type for parameter in model.parameters()} == {MOCK}
    if to == "bitmask":
        stored, expected = read_bitmask(tmp_path / "out"), model.state_dict()
        assert stored.keys() == expected.keys() and all(torch.equal(stored[k], expected[k].cpu()) for k in stored)
        return
    loaded = load_model(str(tmp_path / "out")).eval()
    if to == "hf":
        check_masks_hold(loaded.to(MOCK), load_masks(tmp_path / "out"))
        assert distance(logits(loaded), logits(model)) <= bound
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=MOCK).eval()
    assert {part.device.type for part in (*moved.parameters(), *moved.buffers())} == {MOCK}
    assert distance(logits(moved), logits(loaded)) <= bound


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_packed_models(bits: int) -> None:
    model, masks = pruned()
    bound = network(model)
    pack_model(model, masks, bits)
    assert {part.device.type for part in (*model.parameters(), *model.buffers())} == {MOCK}
    unpacked = copy.deepcopy(model)
    unpack_model(unpacked)
    moved = copy.deepcopy(model).cpu()
    for ids in (IDS, IDS[:, :3]):  # as a prompt, and as few tokens
        assert distance(logits(model, ids), logits(unpacked, ids)) <= bound
        assert distance(logits(model, ids), logits(copy.deepcopy(moved).to(MOCK), ids)) <= bound
    generated = model.generate(IDS[:, :5].to(MOCK), max_new_tokens=4, do_sample=False)
    assert generated.device.type == MOCK and generated.shape[1] > 5


def test_quantised_weights_are_packed_as_they_are() -> None:
    model, masks = pruned(PruningPlan(Unstructured(0.5), Wanda(), quantize=Quantize(4)))
    packed = copy.deepcopy(model)
    pack_model(packed, masks, 4)
    unpack_model(packed)
    name = "model.layers.0.mlp.up_proj"
    expected = model.get_submodule(name).weight.cpu()
    gap = distance(packed.get_submodule(name).weight.cpu(), expected)
    assert gap <= torch.finfo(torch.bfloat16).eps  # of the scales


def test_a_part_of_a_packed_layer_that_does_not_move_is_found() -> None:
    model, masks = pruned()
    pack_model(model, masks, 16)
    model = model.cpu()
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    layer.mask = layer._buffers.pop("mask")  # type: ignore[assignment]
    with pytest.raises((RuntimeError, ValueError), match="device"):
        logits(model.to(MOCK))


def test_smaller_models_stay_on_the_device() -> None:
    torch.manual_seed(0)
    model = load_model("random", config=LLAMA).eval().to(MOCK)
    report = prune(model, [IDS[:, :12]], PruningPlan(Structured(0.25), Wanda()))
    smaller = report.smaller(model)
    assert {parameter.device.type for parameter in smaller.parameters()} == {MOCK}
    assert distance(logits(smaller), logits(model)) <= network(model)
