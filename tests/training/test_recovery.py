import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.training import LoRA, NormsAndBiases, WarmupCosine


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_norms_and_biases_alone_get_gradients(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model(model_type)
    NormsAndBiases().prepare(model)
    model(tokens[0]).logits.logsumexp(-1).mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in dict(model.named_parameters()) if re.search(r"norm|ln_|bias", name)}


def test_a_model_without_norms_and_biases_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has neither norms with weights nor biases"):
        NormsAndBiases().prepare(nn.Linear(2, 2, bias=False))


def test_lora_goes_where_the_patterns_say(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    LoRA(include=["*.mlp.*"], exclude=["*.down_proj"], norms_and_biases=True).prepare(model)
    trained = {re.sub(r"\d+", "N", name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "model.norm.weight",
        "model.layers.N.input_layernorm.weight",
        "model.layers.N.post_attention_layernorm.weight",
        *(f"model.layers.N.mlp.{layer}.lora_{part}" for layer in ("gate_proj", "up_proj") for part in "ab"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["*.nothing"]}, r"LoRA\.include: '\*\.nothing' matches no linear layer"),
        ({"include": "*.none"}, r"LoRA\.include: '\*\.none' matches no linear layer"),
        ({"rank": 0}, r"LoRA\.rank is 0"),
        ({"alpha": -1.0}, r"LoRA\.alpha is -1"),
    ],
)
def test_bad_adapters_are_refused(options: dict, message: str, tiny_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(InputError, match=message):
        LoRA(**options).prepare(tiny_model("llama"))


def rates(steps: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, **options)  # type: ignore[arg-type]
    schedule.fill_total(steps)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_cosine_worked_example() -> None:
    # A rate of 2; two steps of warm-up: 1, 2; then a cosine over four steps from 2 to a tenth of it, 0.2:
    # 0.2 + 1.8 (1 + cos(pi k / 4)) / 2 for k = 0 .. 4.
    expected = [1.0, 2.0, 2.0, 1.73640, 1.1, 0.46360, 0.2]
    assert rates(6, warmup=2, final=0.1) == pytest.approx(expected, abs=1e-5)
    assert rates(2) == pytest.approx([2.0, 1.0, 0.0])
    assert rates(2, total=4) == pytest.approx([2.0, 1.70711, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"warmup": -1}, 2, "warmup is -1"),
        ({"final": 2.0}, 2, "final is 2"),
        ({"total": 0}, 2, "total is 0: it must be at least 1"),
        ({"total": 2, "warmup": 5}, 2, "total is 2: it must be at least 1, and at least warmup, 5"),
        ({}, float("inf"), "set --trainer.max_steps"),
    ],
)
def test_bad_schedules_are_refused(options: dict, steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rates(steps, **options)
