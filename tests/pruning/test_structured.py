"""Structured pruning by the engine: units that go, and the smaller model that is left."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_families import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.allocators import OWL, Allocator, AlphaPruning, Measured
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.ops import Structured, Unstructured
from lit_prune.ops.structured import BlockScore, Unit
from lit_prune.pruning import PruningPlan, prune
from lit_prune.reporting.documents import read_report
from lit_prune.reporting.report import PruningReport
from lit_prune.scorers import Magnitude, Wanda
from lit_prune.solvers import ADMM, SparseGPT
from support.killed import KilledError, kill_at
from support.rounding import distance, network

ALL: list[Unit] = ["channels", "heads", "blocks"]
PLANS = {
    "magnitude": PruningPlan(Structured(0.25), Magnitude(), output_error=False),
    "wanda": PruningPlan(Structured(0.25), Wanda()),
    "wanda, repaired": PruningPlan(Structured(0.25), Wanda(), solver=SparseGPT()),
    "sparsegpt": PruningPlan(Structured(0.25), solver=SparseGPT()),
    "sparsegpt corrected": PruningPlan(Structured(0.25), solver=SparseGPT(), correction=0.5, residual_correction=0.5),
    "two passes": PruningPlan(Structured(0.25), solver=SparseGPT(), sequential=False),
    "admm": PruningPlan(Structured(0.25), solver=ADMM()),
    "admm cubic": PruningPlan(Structured(0.25), solver=ADMM(schedule="cubic")),
}


def blocks_weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_quarter_of_the_channels_goes(
    model_type: str, name: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model(model_type)
    dense = copy.deepcopy(model)
    report = prune(model, tokens, PLANS[name])
    assert report.sparsity == 0.25  # of 48 channels, 12
    assert len({layer.block for layer in report.layers}) == 3
    for layer in report.layers:
        assert layer.reached == 0.25
        weight = model.get_parameter(layer.parameter)
        assert not weight[~layer.mask.unpack()].any()
    small = report.smaller(model)
    batch = tokens[0][:2]
    assert distance(small(input_ids=batch).logits, model(input_ids=batch).logits) <= network(model)
    targeted = sum(layer.numel for layer in report.layers)
    biases = sum(12 for layer in report.layers if layer.kept_rows and model_type != "llama")
    numel = [sum(p.numel() for p in each.parameters()) for each in (dense, small)]
    assert numel[0] - numel[1] == targeted // 4 + biases


@torch.no_grad()
def test_repair_lowers_the_error(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    errors = {}
    for name in ("wanda", "wanda, repaired", "sparsegpt"):
        report = prune(tiny_model(), tokens, PLANS[name])
        errors[name] = [layer.output_error or 0.0 for layer in report.layers if layer.kept_columns]
    assert all(map(float.__lt__, errors["wanda, repaired"], errors["wanda"]))
    assert sum(errors["sparsegpt"]) < sum(errors["wanda, repaired"])


def test_channels_make_up_for_the_rounding_of_heads(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    # A block of the model has 2 key-value heads of 32 * (16 + 8 + 8 + 16) = 1,536 weights and 48 channels of 96: 30 %
    # of 7,680 are 2,304. That is 0.6 of a head, so one goes, and 768 are left, which are 8 channels.
    model = tiny_model()
    report = prune(model, tokens, PruningPlan(Structured(0.3, ["channels", "heads"]), solver=SparseGPT()))
    assert report.sparsity == pytest.approx(0.3)
    for _, layers in report.blocks():
        kept = {layer.name.rpartition(".")[2]: layer.kept for layer in layers}
        assert len(kept["o_proj"].columns) == 16 and len(kept["v_proj"].rows) == 8  # type: ignore[union-attr, arg-type]
        assert len(kept["down_proj"].columns) == 40  # type: ignore[union-attr, arg-type]
    assert 10 * blocks_weights(report.smaller(model)) == 7 * blocks_weights(model)


def test_widths_are_rounded(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    plan = PruningPlan(Structured(0.3, round_to=16), solver=SparseGPT())
    report = prune(tiny_model(), tokens, plan)
    assert {len(layer.kept_columns) for layer in report.layers if layer.kept_columns} == {32}  # 33.6 of 48


def test_a_resumed_run_has_the_same_bits(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = PLANS["sparsegpt corrected"]
    straight = tiny_model()
    expected = prune(straight, tokens, plan)
    with pytest.raises(KilledError):
        prune(tiny_model(), tokens, plan, journal_folder=tmp_path, on_progress=kill_at(2))
    resumed = tiny_model()
    report = prune(resumed, tokens, plan, journal_folder=tmp_path, resume=True)
    assert [layer.kept_columns for layer in report.layers] == [layer.kept_columns for layer in expected.layers]
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_folder_is_a_plain_smaller_model(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model()
    report = prune(model, tokens, PLANS["sparsegpt"])
    folder = report.save(tmp_path / "out", model)
    assert not (folder / "masks.safetensors").exists()
    again = load_model(str(folder))
    assert again.config.intermediate_size == 36  # type: ignore[union-attr]
    with torch.no_grad():
        logits = again(input_ids=tokens[0]).logits
        assert torch.equal(logits, report.smaller(model)(input_ids=tokens[0]).logits)
    found = read_report(folder, {})
    assert found is not None
    assert [layer.as_dict() for layer in found.layers] == [layer.as_dict() for layer in report.layers]
    assert all(torch.equal(a.mask.unpack(), b.mask.unpack()) for a, b in zip(found.layers, report.layers, strict=True))
    report.save(folder, model, overwrite=True)


@pytest.mark.parametrize(
    ("units", "allocator"),
    [
        ("channels", Measured(spread=0.2)),
        ("channels", AlphaPruning(epsilon=0.5)),
        ("channels", OWL()),
        ("heads", AlphaPruning(epsilon=0.5)),
    ],
)
def test_blocks_get_widths_of_their_own_and_the_plug_in_opens_them(
    allocator: Allocator, units: Unit, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    report = prune(model, tokens, PruningPlan(Structured(0.5, units), solver=SparseGPT(), allocator=allocator))
    assert abs(report.sparsity - 0.5) <= (1 / 48 if units == "channels" else 1 / 8)
    widths = {len(layer.kept_columns) for layer in report.layers if layer.kept_columns}
    assert len(widths) > 1
    folder = report.save(tmp_path / "out", model)
    with torch.no_grad():
        expected = report.smaller(model)(input_ids=tokens[0]).logits
    for opened in (load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder)):
        with torch.no_grad():
            assert torch.equal(opened(input_ids=tokens[0]).logits, expected)
        opened.float().requires_grad_()  # an ordinary model, which can be cast, trained and saved
        opened.save_pretrained(tmp_path / "again")
        again = load_model(str(tmp_path / "again"))
        assert again.state_dict().keys() == opened.state_dict().keys()


def test_a_model_with_uneven_widths_is_pruned_again(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    plan = PruningPlan(Structured(0.5, "heads"), solver=SparseGPT(), allocator=AlphaPruning(epsilon=0.5))
    first = load_model(str(prune(model, tokens, plan).save(tmp_path / "first", model)))
    report = prune(first, tokens, PruningPlan(Structured(0.25), solver=SparseGPT()))
    second = load_model(str(report.save(tmp_path / "second", first)))
    for block, narrower in zip(first.model.layers, second.model.layers, strict=True):  # type: ignore[union-attr, arg-type]
        assert narrower.self_attn.o_proj.in_features == block.self_attn.o_proj.in_features
        assert narrower.mlp.down_proj.in_features == 36
    again = prune(second, tokens, PruningPlan(Structured(0.5, "heads"), solver=SparseGPT()))
    third = load_model(str(again.save(tmp_path / "third", second)))
    batch = tokens[0]
    with torch.no_grad():
        assert distance(third(input_ids=batch).logits, second(input_ids=batch).logits) <= network(second)


PROGRAM = """
import {first}, {second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}")
print(sorted({{layer.mlp.down_proj.in_features for layer in model.model.layers}}))
"""


@pytest.mark.parametrize(("first", "second"), [("lit_prune", "transformers"), ("transformers", "lit_prune")])
def test_importing_the_package_is_enough(
    first: str, second: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model()
    report = prune(model, tokens, PruningPlan(Structured(0.5), solver=SparseGPT(), allocator=AlphaPruning(epsilon=0.5)))
    folder = report.save(tmp_path / "out", model)
    program = PROGRAM.format(first=first, second=second, folder=folder)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    widths = sorted({len(layer.kept_columns) for layer in report.layers if layer.kept_columns})
    assert found.stdout.split("\n")[-2] == str(widths)


@pytest.mark.parametrize(
    "shapes",
    [None, 3, {"model.layers.0.mlp.down_proj": [32]}, {"model.layers.0.mlp.down_proj": [32, 49]}, {"model": [1, 1]}],
)
def test_widths_of_an_untrusted_config_are_checked(
    shapes: object, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "lit-prune-widths", "shapes": shapes}  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("score", ["output_error", "cosine"])
@torch.no_grad()
def test_the_blocks_that_change_least_go(
    score: BlockScore, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=5)
    for index in (1, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.{index}.{name}.weight").mul_(1e-3)
    plan = PruningPlan(Structured(0.4, "blocks", block_score=score), Magnitude(), output_error=False)
    report = prune(model, tokens, plan)
    assert report.removed_blocks == [1, 3]
    assert report.sparsity == pytest.approx(0.4)
    folder = report.save(tmp_path / "out", model)
    small = load_model(str(folder))
    assert small.config.num_hidden_layers == 3  # type: ignore[union-attr]
    assert distance(small(input_ids=tokens[0]).logits, model(input_ids=tokens[0]).logits) <= network(model)
    found = read_report(folder, {})
    assert found is not None and found.removed_blocks == [1, 3]


def idle_block(model: nn.Module, index: int) -> None:
    """Let a block of a llama hardly change its inputs."""
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.{index}.{name}.weight").mul_(1e-3)


WEIGHED = {
    "two passes": PruningPlan(Structured(0.35, ALL), None, Measured(), SparseGPT(), sequential=False),
    "wanda": PruningPlan(Structured(0.35, ALL), Wanda(), Measured()),
    "corrected": PruningPlan(Structured(0.35, ALL), None, Measured(), ADMM(), correction=0.5, residual_correction=0.5),
    "dense inputs": PruningPlan(Structured(0.35, ALL), None, Measured(), SparseGPT(), propagate="dense"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", WEIGHED)
@torch.no_grad()
def test_an_idle_block_goes_and_units_of_the_others_fill_up_the_budget(
    name: str, tied: bool, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=4, tie_word_embeddings=tied)
    idle_block(model, 1)
    dense = blocks_weights(model)
    report = prune(model, tokens, WEIGHED[name])
    # A block is 25 % of all, and a channel of 96 weights the smallest unit.
    assert report.removed_blocks == [1]
    assert abs(report.sparsity - 0.35) * dense <= 96 / 2
    assert all(report.allocation[layer.name] == 1 for layer in report.layers if layer.block == 1)
    assert all(layer.reached < 1 for layer in report.layers if layer.block != 1)
    folder = report.save(tmp_path / "out", model)
    small = load_model(str(folder))
    assert small.config.num_hidden_layers == 3  # type: ignore[union-attr]
    assert dense - blocks_weights(small) == round(report.sparsity * dense)
    batch = tokens[0]
    assert distance(small(input_ids=batch).logits, model(input_ids=batch).logits) <= network(model)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch).logits, small(batch).logits)
    found = read_report(folder, {})
    assert found is not None and found.removed_blocks == [1] and found.allocation == report.allocation


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_layers_without_units_of_the_pattern_go_with_their_block_or_stay(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    layers = {"gpt2": "n_layer"}.get(model_type, "num_hidden_layers")
    model = tiny_model(model_type, **{layers: 4})
    dense = sum(p.numel() for p in model.parameters())
    report = prune(model, tokens, PruningPlan(Structured(0.3, ["channels", "blocks"]), None, Measured(), SparseGPT()))
    assert len({layer.block for layer in report.layers}) == 4
    kept = [layer for layer in report.layers if layer.block not in report.removed_blocks and "attn" in layer.name]
    assert kept and all(layer.reached == 0 and layer.kept is None for layer in kept)
    smallest = min(
        layer.shape[0] + layer.shape[1] for layer in report.layers
    )  # a unit has two rows or columns at least
    assert abs(report.sparsity - 0.3) * sum(layer.numel for layer in report.layers) <= 2 * smallest
    small = report.smaller(model)
    assert sum(p.numel() for p in small.parameters()) < dense
    assert distance(small(input_ids=tokens[0]).logits, model(input_ids=tokens[0]).logits) <= network(model)


def test_heads_and_channels_are_weighed_within_a_block(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    # The first head of the first block writes almost nothing, and neither does half of the last block's MLP.
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.o_proj.weight")[:, :16] *= 1e-4
        model.get_parameter("model.layers.2.mlp.down_proj.weight")[:, ::2] *= 1e-4
    plan = PruningPlan(Structured(0.15, ["channels", "heads"]), None, Measured(), SparseGPT())
    report = prune(model, tokens, plan)
    kept = {layer.name: len(layer.kept_columns) for layer in report.layers if layer.kept_columns is not None}
    assert kept["model.layers.0.self_attn.o_proj"] == 16  # one head of two, with two queries of 8
    assert kept["model.layers.2.mlp.down_proj"] == min(kept[f"model.layers.{b}.mlp.down_proj"] for b in range(3))
    assert abs(report.sparsity - 0.15) * blocks_weights(model) <= 96 / 2


def test_a_resumed_run_without_a_block_has_the_same_bits(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    def build() -> nn.Module:
        model = tiny_model(num_hidden_layers=4)
        idle_block(model, 1)
        return model

    plan, straight, resumed = WEIGHED["corrected"], build(), build()
    expected = prune(straight, tokens, plan)
    assert expected.removed_blocks == [1]
    with pytest.raises(KilledError):
        prune(build(), tokens, plan, journal_folder=tmp_path, on_progress=kill_at(2))
    report = prune(resumed, tokens, plan, journal_folder=tmp_path, resume=True)
    assert report.removed_blocks == [1] and report.allocation == expected.allocation
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_blocks_of_a_model_with_uneven_widths_are_removed(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=4)
    idle_block(model, 1)
    plan = PruningPlan(Structured(0.5), None, AlphaPruning(epsilon=0.5), SparseGPT())
    first = load_model(str(prune(model, tokens, plan).save(tmp_path / "first", model)))
    widths = [block.mlp.down_proj.in_features for block in first.model.layers]  # type: ignore[union-attr]
    assert len(set(widths)) > 1
    report = prune(first, tokens, PruningPlan(Structured(0.25, "blocks"), Magnitude()))
    second = load_model(str(report.save(tmp_path / "second", first)))
    assert report.removed_blocks == [1]
    assert [b.mlp.down_proj.in_features for b in second.model.layers] == [widths[k] for k in (0, 2, 3)]  # type: ignore[union-attr]


@pytest.mark.parametrize("given", [{"sparsity": 0.2}, {"allocation": {}}, {"allowed": {}}])
@pytest.mark.parametrize(
    "plan",
    [
        PruningPlan(Structured(0.4, "blocks"), Magnitude()),
        PruningPlan(Structured(0.4, ["blocks", "channels"]), Magnitude(), Measured()),
    ],
)
def test_blocks_are_not_removed_in_steps(
    plan: PruningPlan, given: dict[str, Any], tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))} is given, and plan.pattern.units has blocks"):
        prune(tiny_model(), tokens, plan, **given)


def test_units_on_the_way_are_a_part_of_those_at_the_end(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    # At the end, 30 % are one head of two and 8 channels of 48 (see above); at half of the way, half of each: half a
    # head is rounded to none, as two of four would be even.
    plan = PruningPlan(Structured(0.3, ["channels", "heads"]), solver=SparseGPT())
    kept = []
    for sparsity in (0.0, 0.15, 0.25, None):
        report = prune(tiny_model(), tokens, plan, sparsity=sparsity)
        layers = {layer.name.split("layers.0.")[-1]: layer.kept for layer in report.layers}
        kept.append(tuple(len(layers[n].columns) for n in ("self_attn.o_proj", "mlp.down_proj")))  # type: ignore[union-attr, arg-type]
    assert kept == [(32, 48), (32, 44), (16, 41), (16, 40)]
    with pytest.raises(InputError, match=r"sparsity is 0\.4: .* from 0 to 0\.3"):
        prune(tiny_model(), tokens, plan, sparsity=0.4)


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "opt"])
def test_uneven_heads_of_a_family_that_counts_them_in_its_config_are_refused_before_pruning(
    model_type: str, tokens: list[Tensor]
) -> None:
    model = load_model("random", config={"model_type": model_type, **FAMILIES[model_type]})
    dense = copy.deepcopy(model.state_dict())
    plan = PruningPlan(Structured(0.3, "heads"), Magnitude(), AlphaPruning(epsilon=0.3), output_error=False)
    with pytest.raises(InputError, match=r"has heads, and .* needs as many in every block"):
        prune(model, tokens, plan)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": Structured(0.3, ["channels", "blocks"])}, "allocator is Uniform: only Measured weighs blocks"),
        ({"pattern": Structured(0.3, ALL), "allocator": OWL()}, "allocator is OWL: only Measured weighs blocks"),
        ({"pattern": Structured(0.3, ALL), "allocator": Measured(prior=OWL())}, r"allocator\.prior is OWL"),
        ({"pattern": Structured(0.3, ALL), "allocator": Measured(min_sparsity=0.1)}, r"min_sparsity is 0\.1"),
        ({"pattern": Unstructured(0.3), "allocator": Measured(budget="time")}, "budget is 'time', .* is Unstructured"),
    ],
)
def test_plans_that_weigh_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruningPlan(scorer=Magnitude(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "*.q_proj"}, r"take .*o_proj and not .*q_proj"),
        ({"pattern": Structured(0.3, ["channels", "blocks"]), "exclude": "*.q_proj"}, r"leave out .*q_proj: blocks"),
        ({"pattern": Structured(0.97, ALL)}, "would leave no channels"),
        ({"allocator": Measured(max_sparsity=0.2), "pattern": Structured(0.2, ["channels", "heads"])}, "at most 56%"),
    ],
)
def test_weighed_plans_that_cannot_be_carried_out(
    arguments: dict[str, Any], message: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    dense = copy.deepcopy(model.state_dict())
    plan = {"pattern": Structured(0.3, ALL), "scorer": Magnitude(), "allocator": Measured(), **arguments}
    with pytest.raises(InputError, match=message):
        prune(model, tokens, PruningPlan(**plan))
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "arguments", "message"),
    [
        ("llama", {"pattern": Structured(0.9, "blocks")}, "would leave none of the 3 blocks"),
        ("llama", {"pattern": Structured(0.1, "blocks")}, "less than half of one of 3 blocks"),
        ("llama", {"pattern": Structured(0.4, "blocks"), "exclude": "*.q_proj"}, "leave out .*q_proj"),
        ("llama", {"pattern": Structured(0.4, "blocks"), "allocator": OWL()}, "allocator is OWL: blocks go as a whole"),
        ("llama", {"pattern": Structured(0.99)}, r"sparsity 0.99 would leave no channels of the 48 of .*down_proj"),
        ("llama", {"pattern": Structured(0.97, ["channels", "heads"])}, "would leave no channels of the 48"),
        ("llama", {"pattern": Structured(0.95, round_to=16)}, "would leave no channels of the 48"),
        ("llama", {"pattern": Structured(0.5, round_to=64)}, r"round_to is 64, and .*down_proj has 48 channels"),
        ("llama", {"pattern": Structured(0.25), "include": "*.down_proj"}, "take .*down_proj and not .*gate_proj"),
        ("llama", {"pattern": Structured(0.25), "exclude": "*.mlp.*"}, "has channels, and LlamaForCausalLM has none"),
        ("llama", {"pattern": Structured(0.8, "heads")}, "would leave no heads of the 2"),
        ("gpt2", {"pattern": Structured(0.25, "heads")}, "the config of gpt2 cannot express .*c_attn"),
    ],
)
def test_plans_that_cannot_be_carried_out(
    model_type: str,
    arguments: dict[str, Any],
    message: str,
    tiny_model: Callable[..., nn.Module],
    tokens: list[Tensor],
) -> None:
    model = tiny_model(model_type)
    dense = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prune(model, tokens, PruningPlan(solver=SparseGPT(), **arguments))
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("kept_columns", [3, 2]),
        ("kept_columns", [0, 48]),
        ("kept_columns", [-1]),
        ("kept_columns", [1, 1]),
        ("kept_columns", [0.5]),
        ("kept_columns", "all"),
        ("kept_rows", [[0]]),
        ("shape", [32, 10**9]),
        ("shape", [10**6, 10**6]),
        ("shape", [0, 48]),
        ("shape", [32]),
        ("reached", 0.5),
    ],
)
def test_a_damaged_report_is_refused(
    part: str, value: object, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    content = prune(tiny_model(), tokens, PLANS["wanda"]).as_dict()
    layer = next(layer for layer in content["layers"] if "kept_columns" in layer)
    layer[part] = value
    with pytest.raises(InputError, match="is damaged"):
        PruningReport.from_dict(content, {})
