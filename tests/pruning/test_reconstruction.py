"""What is left of a pruned block learns to give the dense block's outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lit_prune.calibration.batches import Batch, split_batch
from lit_prune.checkpoint.masks import check_masks_hold
from lit_prune.errors import InputError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import find_targets, find_vectors
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import PruningPlan, PruningReport, Reconstruction, prune
from lit_prune.pruning.progress import Position
from lit_prune.reporting.documents import render
from lit_prune.reporting.tables import blocks_table
from lit_prune.scorers import Magnitude, Wanda
from support.rounding import network

TRAINED = Reconstruction(steps=40, rate=0.1)


def plan_of(reconstruction: Reconstruction | None = TRAINED, **more: object) -> PruningPlan:
    return PruningPlan(Unstructured(0.5), Wanda(), reconstruction=reconstruction, **more)  # type: ignore[arg-type]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def block_error(dense: nn.Module, model: nn.Module, tokens: list[Tensor], block: int) -> float:
    """Measure a block that is not the last one by the whole models' own forward passes."""
    with torch.no_grad():
        wanted, found = (
            torch.cat([m(batch, output_hidden_states=True).hidden_states[block + 1] for batch in tokens])
            for m in (dense, model)
        )
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item()


def of_errors(model: nn.Module, error: float) -> float:
    """Return how far two ways to a block's relative squared error may be apart, relative to it.

    It is the square of a difference of outputs, and so much smaller than they, whose rounding it has.
    """
    return 2 * network(model) / error**0.5


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=repr)
def test_every_block_comes_closer_to_the_dense_one(
    model_type: str, pattern: Unstructured | NM, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model(model_type)
    before = bits(model)
    report = prune(model, tokens, PruningPlan(pattern, Wanda(), reconstruction=TRAINED))
    assert [done.block for done in report.reconstructions] == [0, 1, 2]
    for done in report.reconstructions:
        assert 0 < done.after < 0.9 * done.before
    check_masks_hold(model, report.masks)
    plain = prune(tiny_model(model_type), tokens, PruningPlan(pattern, Wanda()))
    assert report.sparsity == plain.sparsity
    assert report.layers[0].mask.bits.equal(plain.layers[0].mask.bits)  # nothing is trained before the first block
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    inside = {name for name in report.changed if ".layers." in name or ".h." in name}
    assert changed <= inside == set(report.changed)
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_reported_errors_are_those_of_the_whole_models(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    # The target is the dense model's own output, behind dense blocks, and not that of a dense block behind pruned ones.
    dense, model = tiny_model(), tiny_model()
    done = prune(model, tokens, plan_of()).reconstructions[1]
    assert done.after == pytest.approx(block_error(dense, model, tokens, 1), rel=of_errors(dense, done.after))


def test_a_correction_follows_the_dense_model_through_blocks_that_are_left_alone(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    # Block 0 is dense, so the inputs of block 1 have not drifted, and there is nothing to make up for.
    alone, corrected = tiny_model(), tiny_model()
    later = {"include": ["*.layers.1.*"], "sequential": False}
    prune(alone, tokens, plan_of(None, **later))
    prune(corrected, tokens, plan_of(None, correction=1.0, **later))
    for name, value in alone.state_dict().items():
        assert torch.equal(value, corrected.state_dict()[name]), name


def test_training_that_makes_a_block_worse_is_dropped(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plain, wild = tiny_model(), tiny_model()
    prune(plain, tokens, plan_of(None))
    report = prune(wild, tokens, plan_of(Reconstruction(steps=3, rate=1e4)))
    assert all(done.after == done.before for done in report.reconstructions)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in wild.state_dict().items())


def test_norms_and_biases_train_with_the_weights_or_not(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    alone, both = tiny_model("gpt2"), tiny_model("gpt2")
    before = bits(alone)
    report = prune(alone, tokens, plan_of(Reconstruction(steps=20, rate=0.1, norms_and_biases=False)))
    more = prune(both, tokens, plan_of(Reconstruction(steps=20, rate=0.1)))
    assert not report.reconstructions[0].vectors
    names = {name.removeprefix("transformer.h.0.") for name in more.reconstructions[0].vectors}
    assert names == {
        *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        *("attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"),
    }
    for name in more.reconstructions[0].vectors:
        assert torch.equal(alone.state_dict()[name], before[name])
        assert not torch.equal(both.state_dict()[name], before[name])


def test_layers_that_are_left_alone_keep_weights_and_biases(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model("gpt2")
    before = bits(model)
    report = prune(model, tokens, plan_of(exclude=["*.c_fc", "transformer.h.0.*"]))
    assert [done.block for done in report.reconstructions] == [1, 2]
    for name, value in model.state_dict().items():
        if ".c_fc." in name or ".h.0." in name or ".h." not in name:
            assert torch.equal(value, before[name]), name
    # The dense hidden states have passed the block that is left alone too.
    dense, after = tiny_model("gpt2"), report.reconstructions[0].after
    assert after == pytest.approx(block_error(dense, model, tokens, 1), rel=of_errors(dense, after))


def test_a_norm_that_blocks_share_is_left_alone(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    blocks = find_blocks(model)
    first, second = (block.module for block in blocks[:2])
    second.input_layernorm.weight = first.input_layernorm.weight
    targets = [t for t in find_targets(model, blocks) if t.block == 0]
    assert list(find_vectors(model, blocks[0], targets)) == ["model.layers.0.post_attention_layernorm.weight"]


def test_the_rate_follows_the_weights_and_the_error(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    class Noted(OneCycleLR):
        def __init__(self, optimizer: Optimizer, max_lr: float, **options: Any) -> None:
            rates.append(max_lr)
            super().__init__(optimizer, max_lr, **options)

    monkeypatch.setattr("lit_prune.pruning.reconstruction.OneCycleLR", Noted)
    plain, first = tiny_model(), {"include": ["*.layers.0.*"]}
    masks = prune(plain, tokens, plan_of(None, **first)).masks
    done = prune(tiny_model(), tokens, plan_of(Reconstruction(steps=2, rate=0.1), **first)).reconstructions[0]
    kept = torch.cat([plain.get_parameter(name)[mask.unpack()] for name, mask in masks.items()])
    assert rates[0] == pytest.approx(0.1 * done.before**0.5 * kept.double().square().mean().sqrt().item())


def test_half_precision_trains_in_float32(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    # Times the error, a step of a thousandth at most is less than bfloat16 can tell; sixty of them are not.
    model, plain = tiny_model().bfloat16(), tiny_model().bfloat16()
    slow = Reconstruction(steps=60, rate=3e-3)
    report = prune(model, tokens, plan_of(slow, device="cpu", hidden_device="cpu"))
    prune(plain, tokens, plan_of(None))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(done.after < done.before for done in report.reconstructions)
    check_masks_hold(model, report.masks)
    weight, start = (m.model.layers[0].mlp.up_proj.weight.float() for m in (model, plain))
    keep = report.masks["model.layers.0.mlp.up_proj.weight"].unpack()
    assert (weight != start)[keep].float().mean() > 0.5


def test_autocast_is_honoured(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    seen: list[torch.dtype] = []
    model = tiny_model()
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    report = prune(model, tokens, plan_of(), forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert all(done.after < done.before for done in report.reconstructions)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(
    context: Callable[[], torch.no_grad], tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model, expected = tiny_model(), tiny_model()
    prune(expected, tokens, plan_of())
    with context():
        prune(model, tokens, plan_of())
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


def test_flags_and_gradients_are_left_as_they_were(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model().train()
    model.model.layers[0].mlp.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    identities = [id(parameter) for parameter in model.parameters()]
    prune(model, tokens, plan_of())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def test_a_method_without_data_gets_a_reconstruction_too(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plan = PruningPlan(Unstructured(0.5), Magnitude(), output_error=False, reconstruction=TRAINED)
    report = prune(tiny_model(), tokens, plan)
    assert all(done.after < done.before for done in report.reconstructions)
    assert "calibrate" not in report.seconds
    with pytest.raises(InputError, match="no calibration batches"):
        prune(tiny_model(), [], plan)


def test_the_stage_is_timed_and_announced(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    seen: list[Position] = []
    report = prune(tiny_model(), tokens, plan_of(), on_progress=seen.append)
    by_stage = ["calibrate", "solve"] * 4 + ["calibrate"]  # q, k and v; o; gate and up; down
    assert [p.stage for p in seen if p.block == 1] == [*by_stage, "reconstruct", "propagate"]
    assert report.seconds["reconstruct"] >= sum(done.seconds for done in report.reconstructions) > 0


def test_a_step_takes_some_sequences_of_a_batch(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    batches: list[Batch] = [{"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0])}, tokens[1]]
    parts = [part for batch in batches for part in split_batch(batch, 2)]
    assert [len(part["input_ids"] if isinstance(part, dict) else part) for part in parts] == [2, 1, 2, 1]
    assert torch.equal(parts[1]["input_ids"], tokens[0][2:]) and torch.equal(parts[2], tokens[1][:2])  # type: ignore[index, arg-type]
    sizes: list[int] = []
    model = tiny_model()
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    prune(model, batches, plan_of(Reconstruction(steps=2, sequences=1), include=["*.layers.0.*"]))
    hook.remove()
    assert set(sizes) == {1}


def test_the_report_tells_and_survives_json(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    report = prune(tiny_model(), tokens, plan_of(Reconstruction(steps=2)))
    again = PruningReport.from_dict(report.as_dict(), {layer.name: layer.mask for layer in report.layers})
    assert again.reconstructions == report.reconstructions and again.changed == report.changed
    assert report.as_dict()["plan"]["reconstruction"] == {
        "class_path": "Reconstruction",
        "init_args": {"steps": 2, "rate": 0.08, "sequences": 2, "norms_and_biases": True},
    }
    assert "block_error.png" in render(report, "tiny")
    errors = blocks_table(report).columns[-1]
    assert (
        next(iter(errors.cells)) == f"{report.reconstructions[0].before:.4f} to {report.reconstructions[0].after:.4f}"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "reconstruction steps is 0: it must be a whole number, 1 or more"),
        ({"steps": 2.5}, "reconstruction steps is 2.5"),
        ({"sequences": True}, "reconstruction sequences is True"),
        ({"rate": 0.0}, "reconstruction rate is 0.0: it must be a number above 0"),
        ({"rate": float("nan")}, "reconstruction rate is nan"),
        ({"rate": float("inf")}, "reconstruction rate is inf"),
        ({"norms_and_biases": "no"}, "reconstruction norms_and_biases is 'no': it must be true or false"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reconstruction(**arguments)  # type: ignore[arg-type]
