"""Blocks, targets and access, on six architectures."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import find_targets
from lit_prune.sharding.parameters import read_weight, weights_restored, write_weight
from support.rounding import distance, gamma

PER_BLOCK = {"llama": 7, "qwen2": 7, "gemma3_text": 7, "opt": 6, "gpt2": 4, "gpt_neox": 4}


@pytest.mark.parametrize("model_type", PER_BLOCK)
def test_blocks_and_their_linear_layers_are_found(model_type: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(model_type)
    blocks = find_blocks(model)
    assert len(blocks) == 3
    assert [model.get_submodule(block.name) for block in blocks] == [block.module for block in blocks]
    targets = find_targets(model, blocks)
    assert [target.block for target in targets] == sorted([0, 1, 2] * PER_BLOCK[model_type])
    for target in targets:
        assert model.get_submodule(target.name) is target.module
        assert "norm" not in target.name and "head" not in target.name and "embed" not in target.name


def test_conv1d_is_read_and_written_as_outputs_by_inputs(tiny_model: Callable[..., nn.Module]) -> None:
    module = tiny_model("gpt2").get_submodule("transformer.h.0.mlp.c_fc")
    inputs = torch.randn(5, 32)
    weight = read_weight(module)
    assert weight.shape == (48, 32)
    few = 2 * gamma(32 + 1, torch.float32)  # inputs and a bias
    assert distance(inputs @ weight.T + module.bias, module(inputs)) <= few
    parameter = module.weight
    write_weight(module, weight * 2)
    assert module.weight is parameter
    assert torch.equal(read_weight(module), weight)  # a view
    assert distance(inputs @ weight.T + module.bias, module(inputs)) <= few


def test_weights_are_restored_bit_for_bit_whatever_happens() -> None:
    module = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    write_weight(module, torch.tensor([[float("nan"), -0.0, 1e-40]], dtype=torch.bfloat16))
    parameter, bits = module.weight, module.weight.detach().view(torch.int16).clone()
    with pytest.raises(KeyError), weights_restored([module]):
        write_weight(module, torch.zeros(1, 3))
        raise KeyError
    assert module.weight is parameter
    assert torch.equal(parameter.detach().view(torch.int16), bits)


def test_patterns_choose_layers(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    targets = find_targets(model, find_blocks(model), include=["*.mlp.*"], exclude=["*.0.*", "*.down_proj"])
    assert [t.name for t in targets] == [f"model.layers.{b}.mlp.{m}_proj" for b in (1, 2) for m in ("gate", "up")]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=rf"plan\.{option}: '\*\.fc1' matches no linear layer; .*q_proj"):
        find_targets(model, find_blocks(model), **{option: ["*.fc1"]})
    with pytest.raises(InputError, match="leave no layer"):
        find_targets(model, find_blocks(model), exclude=["*"])


def test_weights_shared_between_layers_are_left_alone(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = [target.name for target in find_targets(model, find_blocks(model))]
    assert len(names) == 3 * 7 - 2
    assert not any(name in names for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"))


def test_quantised_weights_are_refused(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    module = model.model.layers[0].mlp.up_proj
    module.weight = nn.Parameter(torch.zeros(module.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj is quantised \(torch\.int8\)"):
        find_targets(model, find_blocks(model))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="Sequential has no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
