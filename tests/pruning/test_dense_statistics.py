"""What the engine learns from the dense model, and keeps for other runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocators import OWL, AlphaPruning, Measured
from lit_prune.allocators.base import Allocator, Layer
from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import NM, Unstructured
from lit_prune.ops.spectrum import eigenvalues
from lit_prune.pruning import PruningPlan, prune
from lit_prune.scorers import GBLM, Magnitude, Wanda
from lit_prune.solvers import ADMM, SparseGPT
from support.rounding import network


@pytest.fixture
def spectra(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collect the weights whose eigenvalues are worked out."""
    seen: list[Tensor] = []

    def counted(weight: Tensor) -> Tensor:
        seen.append(weight)
        return eigenvalues(weight)

    monkeypatch.setattr("lit_prune.allocators.alpha_pruning.eigenvalues", counted)
    return seen


def plan_of(allocator: Allocator, cache: Path | None, sparsity: float = 0.5, **more: object) -> PruningPlan:
    cached = None if cache is None else str(cache)
    return PruningPlan(Unstructured(sparsity), Magnitude(), allocator, cache=cached, output_error=False, **more)  # type: ignore[arg-type]


def test_spectral_metrics_are_kept_for_the_next_run(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    expected = prune(tiny_model(), [], plan_of(AlphaPruning(), None))
    first = prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    assert len(spectra) == 2 * 21 and "measure" in first.seconds
    # Neither the sparsity nor the mapping changes what is read off the spectrum.
    second = prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    prune(tiny_model(), [], plan_of(AlphaPruning(epsilon=0.1, mapping="matrix"), tmp_path, 0.7))
    assert len(spectra) == 2 * 21 and "measure" not in second.seconds
    for report in (first, second):
        assert [layer.asked for layer in report.layers] == [layer.asked for layer in expected.layers]
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 21


def test_gradients_are_kept_for_the_same_model_and_data(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = PruningPlan(Unstructured(0.5), GBLM(), cache=str(tmp_path))
    passes: list[int] = []
    read: list[int] = []
    for seed, batches in ((0, tokens), (0, tokens), (1, tokens), (0, tokens[:1])):
        model = tiny_model(seed=seed)
        calls: list[int] = []
        model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        report = prune(model, batches, plan)
        passes.append(len(calls))
        read.append(len(report.cached))
        assert set(report.cached) <= {file.name for file in tmp_path.iterdir()}
    assert passes == [6, 0, 6, 3]
    assert read == [0, 1, 0, 0]  # the report tells


def test_only_layers_that_are_new_are_measured(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path, include=["*.mlp.*"]))
    assert len(spectra) == 9
    report = prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    assert len(spectra) == 21
    assert report.cached == [file.name for file in tmp_path.iterdir()]


def test_other_metrics_windows_and_weights_share_nothing(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    prune(tiny_model(), [], plan_of(AlphaPruning("stable_rank"), tmp_path))
    prune(tiny_model(), [], plan_of(AlphaPruning(windows=True), tmp_path))
    prune(tiny_model(seed=1), [], plan_of(AlphaPruning(), tmp_path))
    pruned = tiny_model()
    prune(pruned, [], plan_of(AlphaPruning(), None, 0.1))
    before = len(spectra)
    prune(pruned, [], plan_of(AlphaPruning(), tmp_path))
    assert len(spectra) == before + 21
    contents = [tuple(json.loads(file.read_text()).values()) for file in tmp_path.iterdir()]
    assert len(contents) == len(set(contents)) == 5


def test_values_from_a_file_are_not_measured(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    np.save(tmp_path / "alpha.npy", np.linspace(2, 4, 21))
    prune(tiny_model(), [], plan_of(AlphaPruning(values=str(tmp_path / "alpha.npy")), tmp_path / "cache"))
    assert not spectra and not (tmp_path / "cache").exists()


class Spy:
    """Remembers what each trial of each block returned, and whether the weights are as before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
        self.errors: dict[int, dict[float, float]] = {}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        observe = Measured.observe

        def watched(allocator: Measured, layers: Sequence[Layer], *arguments: Any) -> Any:
            seen = observe(allocator, layers, *arguments)
            self.errors[layers[0].block] = seen["errors"]
            for name, value in model.state_dict().items():
                assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
            return seen

        monkeypatch.setattr(Measured, "observe", watched)


TRIED = {
    "wanda": PruningPlan(Unstructured(0.5), Wanda(), Measured()),
    "magnitude": PruningPlan(Unstructured(0.5), Magnitude(), Measured(), output_error=False),
    "gblm": PruningPlan(Unstructured(0.5), GBLM(), Measured()),
    "gblm admm": PruningPlan(Unstructured(0.6), GBLM(), Measured(prior=OWL()), ADMM()),
    "sparsegpt": PruningPlan(Unstructured(0.5), None, Measured(prior=AlphaPruning()), SparseGPT()),
    "nm": PruningPlan(NM(4, 8), None, Measured(), SparseGPT(block_size=16)),
}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TRIED)
def test_trials_leave_the_dense_weights_and_meet_the_budget(
    name: str,
    model_type: str,
    tiny_model: Callable[..., nn.Module],
    tokens: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plan = tiny_model(model_type).bfloat16(), TRIED[name]
    spy = Spy(monkeypatch, model)
    report = prune(model, tokens, plan)
    assert report.sparsity == pytest.approx(plan.pattern.sparsity, abs=0.01)
    assert list(spy.errors) == [0, 1, 2]
    for errors in spy.errors.values():
        assert len(errors) == 3
        assert list(errors.values()) == sorted(errors.values())
        assert all(0 < error < 1 for error in errors.values())


def test_the_output_error_is_that_of_the_pruned_block(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pruned = tiny_model(), tiny_model()
    spy = Spy(monkeypatch, model)
    prune(model, tokens, PruningPlan(Unstructured(0.5), Wanda(), Measured()))
    # The first block sees the same inputs in the dense and in the pruned model.
    prune(pruned, tokens, PruningPlan(Unstructured(0.5), Wanda(), include=["model.layers.0.*"], sequential=False))
    inputs = torch.cat(tokens)
    with torch.no_grad():
        dense = tiny_model()(inputs, output_hidden_states=True).hidden_states[1]
        change = pruned(inputs, output_hidden_states=True).hidden_states[1] - dense
    expected = (change.square().sum(-1) / dense.square().sum(-1)).mean().item()
    # The square of a difference of outputs, which is smaller than they and has their rounding.
    assert spy.errors[0][0.5] == pytest.approx(expected, rel=2 * network(model) / expected**0.5)


@pytest.mark.parametrize(("sequences", "same_as"), [(4, [3, 1]), (2, [2]), (9, [3, 3])])
def test_blocks_are_tried_on_the_first_sequences(
    sequences: int,
    same_as: list[int],
    tiny_model: Callable[..., nn.Module],
    tokens: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    part = [{"input_ids": batch[:count]} for batch, count in zip(tokens, same_as, strict=False)]
    for allocator, batches in ((Measured(sequences=sequences), tokens), (Measured(sequences=None), part)):
        model = tiny_model()
        with monkeypatch.context() as patch:
            spy = Spy(patch, model)
            prune(model, batches, PruningPlan(Unstructured(0.5), Wanda(), allocator))
        seen.append(spy.errors)
    assert seen[0] == seen[1]


def test_trials_use_the_solver_draft(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    solve = ADMM.solve

    def counted(solver: ADMM, *arguments: Any) -> Any:
        solved.append((solver._iterations, solver._polish))
        return solve(solver, *arguments)

    monkeypatch.setattr(ADMM, "solve", counted)
    prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), None, Measured(), ADMM()))
    assert solved == [(6, 2)] * 3 * 21 + [(12, 2)] * 21


def test_a_block_that_is_easier_loses_more(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():  # what the block in the middle adds to its input hardly matters
        model.model.layers[1].self_attn.o_proj.weight *= 0.01
        model.model.layers[1].mlp.down_proj.weight *= 0.01
    report = prune(model, tokens, PruningPlan(Unstructured(0.5), Wanda(), Measured(spread=0.2)))
    by_block = [layers[0].asked for _, layers in report.blocks()]
    assert by_block[1] == pytest.approx(0.7)
    assert by_block[0] < 0.5 and by_block[2] < 0.5
    assert all(layer.asked == pytest.approx(by_block[layer.block]) for layer in report.layers)
    total = sum(layer.numel for layer in report.layers)
    assert sum(layer.asked * layer.numel for layer in report.layers) / total == pytest.approx(0.5, abs=1e-9)


def test_a_trial_that_fails_restores_the_weights_and_names_the_layer(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NumericalError, match=r"model\.layers\.0\..*: the Gram matrix .* at damping 0 "):
        prune(model, [tokens[0][:1, :4]], PruningPlan(Unstructured(0.5), None, Measured(), SparseGPT(damping=0.0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_killed_trial_restores_the_weights(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> float:
        raise KeyboardInterrupt

    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("lit_prune.calibration.replay.BlockReplay.output_error", killed)  # all of the block is pruned
    with pytest.raises(KeyboardInterrupt):
        prune(model, tokens, PruningPlan(Unstructured(0.5), Wanda(), Measured()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_with_a_prior_can_be_resumed_and_is_told_from_others(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = PruningPlan(Unstructured(0.5), Wanda(), Measured(prior=AlphaPruning(epsilon=0.1)))
    report = prune(tiny_model(), tokens, plan, journal_folder=tmp_path)
    again = prune(tiny_model(), tokens, plan, journal_folder=tmp_path, resume=True)
    assert [layer.asked for layer in again.layers] == [layer.asked for layer in report.layers]
    other = replace(plan, allocator=Measured(prior=AlphaPruning(epsilon=0.2)))
    with pytest.raises(InputError, match=r"allocator\.init_args\.prior\.init_args\.epsilon was 0\.1 and is now 0\.2"):
        prune(tiny_model(), tokens, other, journal_folder=tmp_path, resume=True)


def test_the_metrics_of_a_prior_are_shared_with_the_allocator_itself(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], spectra: list[Tensor], tmp_path: Path
) -> None:
    prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    prune(tiny_model(), tokens, plan_of(Measured(prior=AlphaPruning()), tmp_path))
    assert len(spectra) == 21
