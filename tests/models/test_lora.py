from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lit_prune.checkpoint.peft_format import without_adapters
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.lora import adapt, adapted_layers, mask_adapters, merged, unmasked_adapter
from lit_prune.ops import PackedMask
from lit_prune.training import LoRA
from support.rounding import distance, network


def test_the_adapter_worked_example() -> None:
    # W = [[1, 0], [2, 3]], its zero pruned; B A = [1, 2]ᵀ [3, 4] = [[3, 4], [6, 8]], scaled by 1/2 and masked:
    # [[1.5, 0], [3, 4]]. The layer so works with [[2.5, 0], [5, 7]].
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    adapt(layer, rank=1, scale=0.5, keep=PackedMask.pack(layer.weight != 0))
    adapted = adapted_layers(layer)[""]
    adapted.lora_a.data, adapted.lora_b.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    assert adapted.keep is not None
    assert adapted.masked_weight(adapted.keep).tolist() == [[2.5, 0.0], [5.0, 7.0]]
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[2.5, 12.0]]
    with merged(layer):
        assert type(layer) is nn.Linear and layer.weight.tolist() == [[2.5, 0.0], [5.0, 7.0]]
        assert list(layer.state_dict()) == ["weight"]
    assert layer.weight.tolist() == [[1.0, 0.0], [2.0, 3.0]]


def pruned_and_trained(model: nn.Module, masked: bool = True) -> nn.Module:
    """Prune half of every matrix at random, and give it adapters with an effect."""
    for module in model.modules():
        if hasattr(module, "weight") and module.weight.dim() == 2 and not isinstance(module, nn.Embedding):
            module.weight.data[torch.rand_like(module.weight) < 0.5] = 0.0
    LoRA(rank=3, alpha=6, masked=masked).prepare(model)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_merging_changes_neither_outputs_nor_zeros(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = pruned_and_trained(tiny_model(model_type))
    zeros = {name: layer.weight == 0 for name, layer in adapted_layers(model).items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    separate = model(tokens[0]).logits
    with merged(model):
        assert not adapted_layers(model)
        assert set(model.state_dict()) == set(tiny_model(model_type).state_dict())
        assert distance(model(tokens[0]).logits, separate) <= network(model)
        for name, zero in zeros.items():
            assert torch.equal(model.get_submodule(name).weight == 0, zero)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = tiny_model(model_type)
    plain.load_state_dict({name: value for name, value in before.items() if name in plain.state_dict()})
    assert (plain(tokens[0]).logits - separate).abs().max() > 1e-2  # the adapters do have an effect


def test_gradients_reach_adapters_alone(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = pruned_and_trained(tiny_model("llama"))
    model(tokens[0]).logits.logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("lora_" in name), name


def test_masks_are_handed_over_and_compared(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    LoRA(rank=1, include=["*.q_proj"]).prepare(model)
    keep = torch.rand(32, 32) > 0.5
    masks = {f"model.layers.{k}.self_attn.q_proj.weight": PackedMask.pack(keep) for k in range(3)}
    assert unmasked_adapter(model, masks) == "model.layers.0.self_attn.q_proj"
    mask_adapters(model, masks)
    assert unmasked_adapter(model, masks) is None
    taken = adapted_layers(model)["model.layers.2.self_attn.q_proj"].keep
    assert taken is not None and torch.equal(taken.unpack(), keep)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_peft_opens_plain_adapters(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = pruned_and_trained(tiny_model(model_type), masked=False)
    zeros = {name: layer.weight == 0 for name, layer in adapted_layers(model).items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(tokens[0]).logits
    with without_adapters(model) as files:
        save_pruned(tmp_path / "out", model, None, {}, files)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opened = load_model(str(tmp_path / "out"))
    assert all(torch.equal(opened.get_submodule(name).weight == 0, zero) for name, zero in zeros.items())
    assert (opened(tokens[0]).logits - expected).abs().max() > 1e-2  # the adapters do have an effect
    with_adapters = PeftModel.from_pretrained(opened, tmp_path / "out" / "adapter")
    assert distance(with_adapters(tokens[0]).logits, expected) <= network(model)


def test_layers_of_other_types_are_refused() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(InputError, match=r"a layer is a Own: adapters go on nn\.Linear and Conv1D"):
        adapt(Own(2, 2), 1, 1.0, None)
