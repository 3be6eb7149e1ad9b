"""The choice between one pass through each block and two, by free memory."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.memory import choose_passes
from lit_prune.pruning.preflight import preflight
from lit_prune.scorers import Magnitude, Wanda

PLAN = PruningPlan(Unstructured(0.5), Wanda())
# 6 x 16 tokens of float32: twice 32 hidden values, and the inputs of q, k, v, o, gate, up and down.
WAITING = 96 * (2 * 32 + 6 * 32 + 48) * 4


def chosen(plan: PruningPlan, model: nn.Module, batches: list[Tensor]) -> bool | None:
    return choose_passes(model, plan.find_targets(model)[1], batches, plan).sequential


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("lit_prune.pruning.memory.free_memory", lambda device: size)


def test_one_pass_is_chosen_if_its_activations_fit(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    free(monkeypatch, WAITING)
    assert chosen(PLAN, model, tokens) is True
    free(monkeypatch, WAITING - 1)
    with pytest.warns(UserWarning, match=r"one pass through each block needs 0.00012 GB .* are passed twice"):
        assert chosen(PLAN, model, tokens) is False
    corrected = PruningPlan(Unstructured(0.5), Wanda(), correction=0.3, residual_correction=0.6)
    with pytest.warns(UserWarning, match=r"\(plan.sequential is false and plan.residual_correction 0\)"):
        plan = choose_passes(model, corrected.find_targets(model)[1], tokens, corrected)
    assert (plan.sequential, plan.correction, plan.residual_correction) == (False, 0.3, 0.0)


def test_a_plan_that_decides_or_cannot_do_otherwise_is_followed(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    free(monkeypatch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sequential in (True, False):
            assert chosen(PruningPlan(Unstructured(0.5), Wanda(), sequential=sequential), model, tokens) is sequential
        assert chosen(PruningPlan(Unstructured(0.5), Wanda(), propagate="dense"), model, tokens) is None
        assert chosen(PruningPlan(Unstructured(0.5), Magnitude(), output_error=False), model, []) is None


def test_a_run_without_memory_for_one_pass_takes_two(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, short = tiny_model(), tiny_model()
    prune(asked, tokens, PruningPlan(Unstructured(0.5), Wanda(), sequential=False))
    free(monkeypatch, 0)
    with pytest.warns(UserWarning, match="are passed twice"):
        expected, report = preflight(short, tokens, PLAN), prune(short, tokens, PLAN)
    assert expected is not None and expected.work.passes == 2
    assert report.identity["plan"]["sequential"] is False
    assert all(torch.equal(value, short.state_dict()[name]) for name, value in asked.state_dict().items())
