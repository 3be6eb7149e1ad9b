from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_prune.calibration.gradients import gradient_norms
from lit_prune.checkpoint.files import save_tensors
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import find_targets
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.scorers import GBLM
from lit_prune.sharding.parameters import to_parameter_layout
from support.rounding import distance, network


def reference(model: nn.Module, tokens: list[Tensor], norm: str) -> dict[str, Tensor]:
    """Work the norms out the plain way: one backward pass per sequence, all gradients held."""
    targets = find_targets(model, find_blocks(model))
    sums = {target.name: torch.zeros(target.shape) for target in targets}
    for sequence in torch.cat(tokens):
        model.zero_grad()
        model(input_ids=sequence[None], labels=sequence[None]).loss.backward()
        for target in targets:
            gradient = to_parameter_layout(target.module, target.module.weight.grad).float()
            sums[target.name] += gradient.square() if norm == "l2" else gradient.abs()
    model.zero_grad()
    return {name: value.sqrt() if norm == "l2" else value for name, value in sums.items()}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_norms_are_those_of_plain_backward_passes(
    model_type: str, norm: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model(model_type)
    expected = reference(model, tokens, norm)
    actual = gradient_norms(model, tokens, find_targets(model, find_blocks(model)), norm)  # type: ignore[arg-type]
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert distance(value, expected[name]) <= 2 * network(model), name  # forward and back


def test_the_model_is_left_as_it_was_and_holds_no_gradients(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model().train()
    model.lm_head.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    held: list[int] = []
    targets = find_targets(model, find_blocks(model))
    for target in targets:
        target.module.weight.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in model.parameters()))
        )
    gradient_norms(model, tokens, targets, "l2")
    assert max(held) == 1  # one weight's gradient at a time
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_half_precision_gradients_are_summed_in_float32(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    exact = tiny_model()
    targets = find_targets(exact, find_blocks(exact))
    expected = gradient_norms(exact, tokens, targets, "l2")
    half = tiny_model().bfloat16()
    actual = gradient_norms(half, tokens, find_targets(half, find_blocks(half)), "l2")
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.05 * expected[name].norm()


def test_norms_are_kept_in_a_file(tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path) -> None:
    def norms() -> dict[str, Tensor]:
        model = tiny_model()
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        result = gradient_norms(model, tokens, find_targets(model, find_blocks(model)), "l2", tmp_path / "norms")
        passes.append(len(calls))
        return result

    passes: list[int] = []
    first, again = norms(), norms()
    assert passes == [6, 0]
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("damage", [lambda t: -t, lambda t: t[:1], lambda t: t.to(torch.int8)])
def test_norms_in_a_file_that_cannot_be_norms_are_refused(
    damage: Callable[[Tensor], Tensor], tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model, file = tiny_model(), tmp_path / "norms.safetensors"
    targets = find_targets(model, find_blocks(model))
    norms = gradient_norms(model, tokens, targets, "l2", file)
    name = targets[0].name
    save_tensors(file, {**norms, name: damage(norms[name]).contiguous()})
    with pytest.raises(InputError, match=f"norms.safetensors' is damaged: the gradient norms of {name}"):
        gradient_norms(model, tokens, targets, "l2", file)


def test_nan_gradients_name_layer_and_sequence(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"gradient of model\.layers\.2\..* holds NaN .* sequence 0"):
        gradient_norms(model, tokens, find_targets(model, find_blocks(model)), "l2")


def test_pruning_uses_the_gradients_of_the_dense_model(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    expected = reference(model, tokens, "l1")
    name = "model.layers.2.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    report = prune(model, tokens, PruningPlan(Unstructured(0.5), GBLM("l1", gradient_only=True)))
    pruned = (weight.abs() * expected[name]).topk(16, dim=1, largest=False).indices
    keep = report.masks[f"{name}.weight"].unpack()
    assert (~keep.gather(1, pruned)).float().mean() > 0.99
    assert "gradients" in report.seconds
