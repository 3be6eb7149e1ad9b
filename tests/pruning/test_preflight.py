"""What a run is expected to cost, against counts by hand and against runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocators import OWL, Measured
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction
from lit_prune.pruning.preflight import Preflight, Work, preflight
from lit_prune.scorers import GBLM, Magnitude, Scorer, Wanda
from lit_prune.solvers import ADMM, SparseGPT

HALF = Unstructured(0.5)


def test_the_work_is_counted(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    # Llama: q and o [32, 32], k and v [16, 32], gate and up [48, 32], down [32, 48]; 3 blocks, 6 x 16 tokens.
    weights, inputs = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32, (32, 32, 32, 48)
    attention = 2 * 2 * 16 * 32  # q kT and p v for each token, over 16 positions
    expected = preflight(tiny_model(), tokens, PruningPlan(HALF, solver=SparseGPT(), output_error=False))
    assert expected is not None
    assert expected.work.forward == 96 * 3 * (2 * weights + attention)
    assert expected.work.passes == 1
    assert expected.work.gram == 96 * 3 * sum(i * (i + 1) for i in inputs)
    factors = sum(2 * i**3 / 3 for i in inputs)
    sweeps = (2 * 32 + 2 * 16) * 32**2 + 2 * 48 * 32**2 + 32 * 48**2
    assert expected.work.solve == pytest.approx(3 * (factors + sweeps))


@pytest.mark.parametrize(
    ("plan", "passes"),
    [
        (PruningPlan(HALF, Wanda()), 1),
        (PruningPlan(HALF, Wanda(), propagate="dense"), 1),
        (PruningPlan(HALF, Wanda(), correction=0.3), 2),
        (PruningPlan(HALF, Wanda(), sequential=False), 2),
        (PruningPlan(HALF, Wanda(), correction=0.3, sequential=False), 3),
        (PruningPlan(HALF, GBLM()), 5),
        (PruningPlan(HALF, Wanda(), OWL()), 3),
        (PruningPlan(HALF, Wanda(), Measured(sequences=3)), 1 + 5 / 2),
        (PruningPlan(HALF, Wanda(), reconstruction=Reconstruction(steps=12, sequences=1)), 3 + 2 + 3 * 12 / 6),
    ],
)
def test_passes_are_counted(
    plan: PruningPlan, passes: float, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    expected = preflight(tiny_model(), tokens, plan)
    assert expected is not None and expected.work.passes == pytest.approx(passes)
    assert expected.seconds > 0 and expected.memory > 0


def test_a_plan_without_data_costs_nothing_to_speak_of(tiny_model: Callable[..., nn.Module]) -> None:
    assert preflight(tiny_model(), [], PruningPlan(HALF, Magnitude(), output_error=False)) is None


def test_memory_grows_with_what_is_held(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    def memory(batches: list[Tensor], **more: object) -> int:
        more = {"sequential": False} | more
        expected = preflight(tiny_model(), batches, PruningPlan(HALF, solver=ADMM(), **more))  # type: ignore[arg-type]
        assert expected is not None
        return expected.memory

    usual = memory(tokens)
    states = 96 * 32 * 4
    assert memory(tokens * 2) == usual + states
    assert memory(tokens, hidden_dtype="bfloat16") == usual - states // 2
    assert memory(tokens, correction=0.3) == usual + states + 4 * (3 * 32**2 + 48**2)
    # The residual stream, the normed hidden states, and the inputs of q, k and v, of o, of gate and up, and of down.
    waiting = 96 * (2 * 32 + 3 * 32 + 48) * 4
    moments = 4 * (2 * 32**2 + 32 * 48)  # of q, o and down, which have 32 outputs
    assert memory(tokens, sequential=True) == usual + waiting
    assert memory(tokens, sequential=True, residual_correction=0.3) == usual + states + 2 * waiting + moments


def test_gradient_norms_count_where_they_are_held(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    def memory(scorer: Scorer) -> int:
        expected = preflight(tiny_model(), tokens, PruningPlan(HALF, scorer, output_error=False))
        assert expected is not None
        return expected.memory

    weights = 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)  # q, k, v, o, gate, up, down of three blocks
    assert memory(GBLM()) == memory(Wanda()) + 4 * weights


def test_it_changes_nothing(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert preflight(model, tokens, PruningPlan(HALF, Wanda(), exclude=["*.h.0.*"])) is not None
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_says_what_to_do_where_memory_is_short() -> None:
    work = Work(1.0, 1.0, 0.0, 0.0)
    assert str(Preflight(work, 30.0, 2_000_000_000, 3_000_000_000)) == "about 30 seconds and 2 GB beyond the model"
    short = str(Preflight(work, 300.0, 2_000_000_000, 1_000_000_000))
    assert short.startswith("about 5 minutes and 2 GB beyond the model, of which 1 GB are free: lower data.sequences")
    sequential = Preflight(work, 300.0, 2_000_000_000, 1_000_000_000, sequential=True)
    assert str(sequential).endswith(
        "lower data.sequences or data.seqlen, or set plan.sequential to false and plan.residual_correction to 0"
    )
    assert Preflight(work, 1.0, 1, None).fits
