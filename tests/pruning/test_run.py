"""The engine, on six architectures."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lit_prune
from lit_prune.allocators import FromFile, Measured
from lit_prune.checkpoint.files import as_json
from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import NM, LayerStats, PackedMask, Unstructured, select
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.progress import Position
from lit_prune.pruning.solving import LayerSolver
from lit_prune.reporting.report import LayerReport, PruningReport
from lit_prune.reporting.summary import summary
from lit_prune.scorers import GBLM, Magnitude, Scorer, SparseGPTSaliency, Wanda
from lit_prune.solvers import ADMM, SparseGPT
from support.killed import KilledError, kill_at
from support.rounding import distance

MODELS = ["llama", "qwen2", "gemma3_text", "opt", "gpt2", "gpt_neox"]
PLANS = {
    "magnitude": PruningPlan(Unstructured(0.5), Magnitude()),
    "wanda": PruningPlan(Unstructured(0.6), Wanda()),
    "saliency": PruningPlan(Unstructured(0.3, "row"), SparseGPTSaliency()),
    "sparsegpt": PruningPlan(Unstructured(0.7), solver=SparseGPT()),
    "sparsegpt 2:4": PruningPlan(NM(2, 4), solver=SparseGPT(block_size=16)),
    "wanda 2:4": PruningPlan(NM(2, 4), Wanda()),
    "admm corrected": PruningPlan(Unstructured(0.5), solver=ADMM(iterations=6), correction=0.5),
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", PLANS)
def test_exactly_the_targeted_weights_are_pruned(
    model_type: str, name: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model, plan = tiny_model(model_type), PLANS[name]
    before = copy.deepcopy(model.state_dict())
    report = prune(model, tokens, plan)
    masks = report.masks
    assert len(masks) == len(plan.find_targets(model)[1])
    for parameter, value in model.state_dict().items():
        if parameter not in masks:
            assert torch.equal(value, before[parameter]), parameter
            continue
        keep = masks[parameter].unpack()
        assert keep.shape == value.shape
        assert (value[~keep] == 0).all()
    for layer in report.layers:
        assert abs(layer.reached - plan.pattern.sparsity) * layer.numel <= 1
        assert layer.output_error is not None and 0 <= layer.output_error < 1.5
    assert not model.training


def test_the_stages_agree_with_the_parts(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    # The first layer of the first block, worked out with the parts alone.
    model = tiny_model().double()
    module = model.model.layers[0].self_attn.q_proj
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for batch in tokens:
        model(input_ids=batch)
    handle.remove()
    stats = LayerStats.from_inputs(torch.cat(inputs))
    expected = SparseGPT().solve(module.weight, stats, Unstructured(0.5)).weight
    prune(model, tokens, PruningPlan(Unstructured(0.5), solver=SparseGPT()))
    # In float64: sums over 96 tokens, and a factor of a matrix whose condition the damping keeps below 32 / 0.01.
    assert distance(module.weight, expected) <= 96 * 3200 * torch.finfo(torch.float64).eps


def test_later_blocks_see_the_pruned_blocks_before_them(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    whole, later = tiny_model(), tiny_model()
    first = ["model.layers.0.*"]
    prune(whole, tokens, PruningPlan(Unstructured(0.5), Wanda()))
    prune(later, tokens, PruningPlan(Unstructured(0.5), Wanda(), include=first))
    prune(later, tokens, PruningPlan(Unstructured(0.5), Wanda(), exclude=first))
    assert all(torch.equal(value, later.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_plan_that_needs_no_data_reads_none(tiny_model: Callable[..., nn.Module]) -> None:
    def no_data() -> None:
        raise AssertionError("read")
        yield

    report = prune(tiny_model(), no_data(), PruningPlan(Unstructured(0.5), Magnitude(), output_error=False))
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)
    assert all(layer.output_error is None for layer in report.layers)


def test_an_allocation_is_carried_out(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text('{"model.layers.0.*": 0.4, "*": 0.8}')
    report = prune(
        tiny_model(), tokens, PruningPlan(Unstructured(0.5), Magnitude(), FromFile(str(tmp_path / "a.json")))
    )
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    by_block = [layers[0].asked for _, layers in report.blocks()]
    assert by_block == pytest.approx([0.3, 0.6, 0.6])


def test_an_allocation_makes_mixed_nm(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text('{"model.layers.0.*": 0.4, "*": 0.7}')
    report = prune(tiny_model(), tokens, PruningPlan(NM(3, 8), None, FromFile(str(tmp_path / "a.json")), ADMM()))
    assert report.sparsity == pytest.approx(5 / 8, abs=0.01)
    assert {layer.asked * 8 for layer in report.layers} <= {3, 4, 5, 6}
    assert all(layer.asked == layer.reached for layer in report.layers)


def test_excluded_blocks_are_passed_through(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    report = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda(), exclude=["*.layers.1.*"]))
    assert [index for index, _ in report.blocks()] == [0, 2]


def test_half_precision_and_other_devices_for_waiting_states(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model().bfloat16()
    report = prune(model, tokens, PruningPlan(NM(2, 4), solver=SparseGPT(), device="cpu", hidden_device="cpu"))
    assert report.sparsity == 0.5
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_progress_counts_blocks_and_estimates_time(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    seen: list[Position] = []
    report = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda()), on_progress=seen.append)
    # The first block shows which layers share their inputs: q, k and v, and gate and up.
    for block, before, parts in ((0, ["record"], 7), (1, [], 4), (2, [], 4)):
        assert [p.stage for p in seen if p.block == block] == [*before, *["calibrate", "solve"] * parts, "calibrate"]
    assert [p.block for p in seen] == sorted(p.block for p in seen)
    assert all((p.seconds_left is not None) == (p.block > 0) for p in seen)
    assert set(report.seconds) == {"record", "calibrate", "solve"}
    assert report.peak_memory and report.peak_memory > 0


def test_dense_propagation_takes_one_pass_and_sees_the_dense_model(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = PruningPlan(Unstructured(0.5), Wanda(), propagate="dense")
    model, passes = tiny_model(), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: passes.append(1))
    report = prune(model, tokens, plan)
    assert len(passes) == len(tokens) and "propagate" not in report.seconds
    # Every block alone, behind dense ones, is pruned to the same.
    for block in range(3):
        alone = tiny_model()
        at_once = PruningPlan(Unstructured(0.5), Wanda(), include=[f"*.layers.{block}.*"], sequential=False)
        prune(alone, tokens, at_once)
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.equal(alone.get_parameter(name), model.get_parameter(name))

    with pytest.raises(KilledError):
        prune(tiny_model(), tokens, plan, journal_folder=tmp_path, on_progress=kill_at(2))
    resumed = tiny_model()
    prune(resumed, tokens, plan, journal_folder=tmp_path, resume=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())


def test_hidden_states_wait_in_half_precision(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    exact = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda()))
    half = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda(), hidden_dtype="bfloat16"))
    kept = [(mask.unpack() == half.masks[name].unpack()).float().mean() for name, mask in exact.masks.items()]
    assert 0.97 < min(kept) < 1


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: PruningPlan(Unstructured(0.5), Wanda(), propagate="none"), "propagate is 'none'"),
        (lambda: PruningPlan(Unstructured(0.5), Wanda(), propagate="dense", correction=0.3), "they need 'pruned'"),
        (lambda: PruningPlan(Unstructured(0.5), Wanda(), hidden_dtype="int8"), "hidden_dtype is 'int8'"),
        (lambda: PruningPlan(Unstructured(0.5)), "Zero needs a plan.scorer"),
    ],
)
def test_parts_that_do_not_fit_are_refused(plan: Callable[[], PruningPlan], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan()


def test_nothing_changes_when_a_plan_cannot_be_carried_out(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model("llama", intermediate_size=30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"divisible by 4, and model\.layers\.0\.mlp\.down_proj has 30"):
        prune(model, tokens, PruningPlan(NM(2, 4), Wanda()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_singular_gram_matrix_names_the_layer(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    with pytest.raises(NumericalError, match=r"model\.layers\.0\..*: the Gram matrix .* at damping 0 "):
        prune(tiny_model(), [tokens[0][:1, :4]], PruningPlan(Unstructured(0.5), solver=SparseGPT(damping=0.0)))


def test_the_public_names_are_the_documented_ones() -> None:
    for name in lit_prune.__all__:
        assert getattr(lit_prune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = lit_prune.nope


def test_correction_reads_the_dense_models_inputs(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    # The drift of the last block's q_proj, from hooks on the dense and on the pruned model as wholes.
    model, dense = tiny_model(), tiny_model()
    plan = PruningPlan(Unstructured(0.5), Magnitude(), include=["*.layers.0.*"], correction=0.5)
    prune(model, tokens, plan)

    def inputs_of(whole: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        hook = whole.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with torch.no_grad():
            for batch in tokens:
                whole(input_ids=batch)
        hook.remove()
        return torch.cat(seen)

    stats = LayerStats(frozenset({"gram", "drift"}))
    stats.update(inputs_of(model), 6, inputs_of(dense))
    weight = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    expected = select(stats.correct_drift(weight, 0.5).abs(), Unstructured(0.5))
    report = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Magnitude(), correction=0.5))
    keep = report.masks["model.layers.1.self_attn.q_proj.weight"].unpack()
    assert (keep == expected).float().mean() > 0.99


def test_correction_brings_a_block_nearer_its_dense_outputs(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    dense = tiny_model()
    with torch.no_grad():
        logits = dense(input_ids=torch.cat(tokens)).logits
        errors = []
        for correction in (0.0, 0.5):
            model = tiny_model()
            prune(model, tokens, PruningPlan(Unstructured(0.7), solver=ADMM(), correction=correction))
            errors.append((model(input_ids=torch.cat(tokens)).logits - logits).square().mean().item())
    assert errors[1] < errors[0]


def test_a_correction_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(InputError, match=r"plan\.correction is 1\.5: it must be in \[0, 1\]"):
        PruningPlan(Unstructured(0.5), Magnitude(), correction=1.5)


class Outspoken(Scorer):
    """Reads the Gram matrix whenever it is asked."""

    needs = frozenset({"gram"})

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return weight.abs() * stats.gram.diagonal().sqrt()


@pytest.mark.parametrize("scorer", [None, Outspoken()], ids=["no score", "a score"])
def test_gram_matrices_that_are_given_away_are_missed_by_nobody(
    scorer: Scorer | None, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plan = PruningPlan(Unstructured(0.5), scorer, Measured(), SparseGPT())
    kept, given = tiny_model(), tiny_model()
    prune(kept, tokens, replace(plan, output_error=True))
    prune(given, tokens, replace(plan, output_error=False))
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in kept.state_dict().items())


def test_diagnostics_of_the_scorer_are_reported(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Per layer, as medians in the summary, and from the journal of a resumed run."""
    model, plan = tiny_model(), PruningPlan(Unstructured(0.5), GBLM(alpha="auto", share=0.3))
    report = prune(model, tokens, plan, journal_folder=tmp_path)
    ratio, changed = "gradient term / activation term", "mask differs from Wanda's"
    assert [layer.diagnostics[ratio] for layer in report.layers] == pytest.approx([0.3] * len(report.layers))
    assert 0 < report.diagnostics[changed] < 0.5
    assert (f"{ratio} (median)", "30.00%") in summary(report)
    again = PruningReport.from_dict(json.loads(as_json(report.as_dict())), {x.name: x.mask for x in report.layers})
    assert again.diagnostics == report.diagnostics
    resumed = prune(tiny_model(), tokens, plan, journal_folder=tmp_path, resume=True)
    assert resumed.diagnostics == report.diagnostics
    with pytest.warns(UserWarning, match=r"raise plan\.scorer\.alpha, which is 1e-06, or set it to auto"):
        prune(tiny_model(), tokens, replace(plan, scorer=GBLM(alpha=1e-6)))


def test_solves_are_partitioned_by_the_seconds_of_the_previous_block(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = tiny_model(), PLANS["sparsegpt"]
    _, targets = plan.find_targets(model)
    first, second = (sorted((t for t in targets if t.block == index), key=lambda t: t.name) for index in (0, 1))
    stats = {target.name: LayerStats(frozenset({"gram"})) for target in second}
    mask = PackedMask.pack(torch.ones(1, 8, dtype=torch.bool))
    seconds = [1.0, 5.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    before = [
        LayerReport(
            name=t.name, block=0, shape=t.shape, asked=0.5, reached=0.5, output_error=None, seconds=s, mask=mask
        )
        for t, s in zip(first, seconds, strict=True)
    ]
    monkeypatch.setattr("lit_prune.ops.collectives.world_size", lambda: 2)
    solver = LayerSolver(plan, {}, {})
    owners = list(solver._owners(second, stats, before).values())
    assert owners == [1, 0, 1, 1, 1, 1, 1]  # the second one takes as long as all others together
    assert owners != list(solver._owners(second, stats, ()).values())
