"""Mixtures of experts, each pruned by itself."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.calibration.replay import BlockReplay
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.models.blocks import find_blocks
from lit_prune.models.experts import Experts, apart, take_apart, together
from lit_prune.models.load import load_model
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.scorers import GBLM, Magnitude, Wanda
from lit_prune.solvers import ADMM, SparseGPT
from support.rounding import check_sums, distance, network

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "qwen3_moe": {**_COMMON, "num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "gpt_oss": {**_COMMON, "num_local_experts": 4},  # transposed, interleaved, with biases
}
TOKENS = [torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(k)) for k in range(2)]


def mixture(model_type: str = "mixtral", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return load_model("random", config={"model_type": model_type, **MIXTURES[model_type], **config})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS[0]).logits


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_come_apart_and_together_without_a_trace(model_type: str) -> None:
    model = mixture(model_type)
    before, names, parameters = logits(model), list(model.state_dict()), list(model.parameters())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with apart(model):
        assert sum(isinstance(module, Experts) for module in model.modules()) == 2
        between = logits(model)
        # Not to the bit on every CPU: x W + b, as gpt_oss has it, rounds unlike a linear layer.
        assert distance(between, before) <= network(model)
        kept = [module for module in model.modules() if isinstance(module, Experts)]
        parts = list(model.parameters())
        with together(model):
            assert list(model.state_dict()) == names and torch.equal(logits(model), before)
        assert kept == [module for module in model.modules() if isinstance(module, Experts)]
        assert all(a is b for a, b in zip(model.parameters(), parts, strict=True))
        assert not any(module.training for module in model.modules())
        copied = copy.deepcopy(model)  # the experts' views of one tensor become tensors of their own
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), parts, strict=True))
        for other in (model, copied):
            assert distance(logits(other), between) <= network(model)
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))  # an optimizer still knows them


def test_gradients_are_those_of_the_fused_model() -> None:
    model = mixture()
    model(input_ids=TOKENS[0], labels=TOKENS[0]).loss.backward()
    fused = [layer.mlp.experts.down_proj.grad for layer in model.model.layers]
    take_apart(model)
    model(input_ids=TOKENS[0], labels=TOKENS[0]).loss.backward()
    for layer, expected in zip(model.model.layers, fused, strict=True):
        for index, expert in enumerate(layer.mlp.experts):
            assert distance(expert.down_proj.weight.grad, expected[index]) <= 2 * network(model)  # forward and back


def test_each_expert_has_the_statistics_of_its_own_tokens() -> None:
    model = mixture()
    take_apart(model)
    blocks = find_blocks(model)
    experts = model.model.layers[0].mlp.experts
    layers = {
        f"{index}.{name}": layer for index, expert in enumerate(experts) for name, layer in expert.named_children()
    }
    stats = BlockReplay(model, blocks, TOKENS).collect(0, layers, frozenset({"gram"}))
    seen: dict[int, list[Tensor]] = {index: [] for index in range(4)}
    for index, expert in enumerate(experts):
        expert.gate_up_proj.register_forward_pre_hook(lambda module, args, index=index: seen[index].append(args[0]))
    for batch in TOKENS:
        with torch.no_grad():
            model(input_ids=batch)
    assert sum(stats[f"{index}.gate_up_proj"].tokens for index in range(4)) == 2 * 8 * 32  # two experts for each token
    for index in range(4):
        inputs = torch.cat(seen[index])
        assert stats[f"{index}.gate_up_proj"].tokens == len(inputs)
        check_sums(stats[f"{index}.gate_up_proj"].gram, inputs.T @ inputs, len(inputs), inputs.abs().T @ inputs.abs())


PLANS = {
    "magnitude": PruningPlan(Unstructured(0.5), Magnitude()),
    "wanda": PruningPlan(NM(2, 4), Wanda()),
    "gblm": PruningPlan(Unstructured(0.5), GBLM()),
    "sparsegpt": PruningPlan(Unstructured(0.5), None, None, SparseGPT(), correction=0.3),
    "admm": PruningPlan(Unstructured(0.5), None, None, ADMM(), reconstruction=Reconstruction(steps=2)),
}


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("name", PLANS)
def test_experts_are_pruned_saved_and_reopened(name: str, model_type: str, tmp_path: Path) -> None:
    model = mixture(model_type)
    dense = logits(model)
    report = prune(model, TOKENS, PLANS[name])
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert sum(".experts." in layer.name for layer in report.layers) == 2 * 4 * 2
    assert all(layer.reached == pytest.approx(0.5, abs=1e-2) for layer in report.layers)
    assert not isinstance(model.model.layers[0].mlp.experts, Experts)
    assert (model.model.layers[0].mlp.experts.down_proj == 0).float().mean().item() == pytest.approx(0.5, abs=1e-2)
    pruned = logits(model)
    assert not torch.equal(pruned, dense)
    for to, form in (("hf", nullcontext), ("hf", apart), ("bitmask", nullcontext), ("bitmask", apart)):
        with form(model):  # type: ignore[operator]
            folder = save_pruned(tmp_path / to, model, None, report.masks, {}, True, to)  # type: ignore[arg-type]
        assert torch.equal(logits(load_model(str(folder))), pruned)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), pruned)
    assert load_masks(tmp_path / "hf").keys() == report.masks.keys()


def test_experts_that_saw_too_few_tokens_share_the_statistics_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    with torch.no_grad():  # the router never chooses the last expert
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = -layer.mlp.gate.weight[:3].sum(0)
            layer.mlp.gate.forward = _without_last(layer.mlp.gate.forward)
    with pytest.warns(
        UserWarning, match=r"1 of 4 experts saw fewer than 16 calibration tokens, .*experts\.3.* 0: .*pooled"
    ):
        report = prune(model, TOKENS, PruningPlan(Unstructured(0.5), Wanda()))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_whose_statistics_an_expert_is_pruned_with() -> None:
    model = mixture()
    take_apart(model)
    experts = model.model.layers[0].mlp.experts
    layers = {
        f"{index}.{name}": layer for index, expert in enumerate(experts) for name, layer in expert.named_children()
    }
    few = [TOKENS[0][:1, :12]]  # 24 tokens for 4 experts: fewer than the 16 inputs for some, of 24 inputs for all
    with pytest.warns(UserWarning, match="pooled"):
        stats = BlockReplay(model, find_blocks(model), few).collect(0, layers, frozenset({"gram"}))
    tokens = {name: found.tokens for name, found in stats.items()}
    assert 24 in [tokens[f"{index}.gate_up_proj"] for index in range(4)]  # those of all experts together
    assert sum(tokens[f"{index}.down_proj"] for index in range(4)) == 24  # hidden units of its own for each


def _without_last(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def routed(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, weights, chosen = forward(hidden)
        return scores, weights, chosen % 3

    return routed


def test_an_unknown_form_of_experts_is_told() -> None:
    model = mixture()
    del model.model.layers[0].mlp.experts.has_gate
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.experts\.gate_up_proj and 1 more .* neither pruned nor"):
        assert take_apart(model) == ["model.layers.1.mlp.experts"]
