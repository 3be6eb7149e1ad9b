"""Two real processes prune one model together, and agree with one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.checkpoint.files import load_tensors, read_json
from lit_prune.checkpoint.masks import load_masks
from support.processes import run_ranks
from support.pruned_together import prune_together
from support.shared import Shared

pytestmark = pytest.mark.timeout(300)


PLANS = ["wanda", "sparsegpt", "gblm", "admm", "reconstructed", "dense", "sequential", "weighed"]


def run(out: Path, plans: list[str], processes: int = 1, **options: Any) -> list[str]:
    """Carry plans out and return the last line of what each failed process said."""
    ended = run_ranks(out / "log", partial(prune_together, out, plans, **options), processes)
    return [process.last_line for process in ended if process.code]


def alone(shared: Shared, plans: list[str], **options: Any) -> Path:
    """Return the folder of what one process makes of plans."""

    def make(folder: Path) -> None:
        assert run(folder, plans, **options) == []

    return shared.once(f"pruned alone: {plans} {options}", make)


def masks(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    return {name: mask.unpack() for name, mask in load_masks(folder / f"masks{rank}.safetensors").items()}


# Sums over at most 320 tokens, in float64, and solves with matrices whose condition the damping keeps below 10,000.
ROUNDING = 320 * 1e4 * torch.finfo(torch.float64).eps
# Adam divides each gradient by its own size, so one that is t times smaller than most carries t times their rounding.
# Of n gradients of a matrix the smallest is about n times smaller: in norms that is sqrt(n), in each of six steps.
BY_ADAM = ROUNDING * (1 + 6 * (32 * 48) ** 0.5)


def check_equal(one: Path, other: Path, bound: float) -> None:
    """Check that masks are the same, and weights to within rounding; no two scores are as near as that."""
    theirs, values = masks(other), load_tensors(other / "weights0.safetensors")
    assert all(torch.equal(mask, theirs[name]) for name, mask in masks(one).items())
    for name, value in load_tensors(one / "weights0.safetensors").items():
        assert value.dtype == torch.float64
        assert (value - values[name]).norm() <= bound * value.norm(), name


def bound(plan: str) -> float:
    return BY_ADAM if plan == "reconstructed" else ROUNDING


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "FSDP2"])
def test_two_processes_agree_with_one(shard: bool, shared: Shared, tmp_path: Path) -> None:
    one = alone(shared, PLANS)
    assert run(tmp_path / "two", PLANS, 2, shard=shard) == []
    for plan in PLANS:
        two = tmp_path / "two" / plan
        check_equal(one / plan, two, bound(plan))
        first, second = (load_tensors(two / f"weights{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert all(torch.equal(mask, masks(two, 1)[name]) for name, mask in masks(two).items())
        reports = [read_json(two / f"report{rank}.json") for rank in (0, 1)]
        assert reports[0]["layers"] == reports[1]["layers"]
        assert reports[0]["allocation"] == reports[1]["allocation"]


@pytest.mark.parametrize(
    ("plans", "options"),
    [
        (["wanda", "reconstructed", "sequential"], {"model_type": "mixtral"}),
        (["admm", "gblm", "reconstructed", "sequential", "weighed"], {"sequences": 1, "length": 128}),
    ],
    ids=["experts", "a process without a sequence"],
)
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "FSDP2"])
def test_all_processes_are_heard(
    plans: list[str], options: dict[str, Any], shard: bool, shared: Shared, tmp_path: Path
) -> None:
    one = alone(shared, plans, **options)
    assert run(tmp_path / "two", plans, 2, **options, shard=shard) == []
    for plan in plans:
        check_equal(one / plan, tmp_path / "two" / plan, bound(plan))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("overflow", "output of model.layers.1 holds NaN or Inf on calibration batch 0"),
        ("singular", "the Gram matrix [32, 32] is not positive definite at damping 0"),
    ],
)
def test_what_fails_in_one_process_is_said_by_all(plan: str, message: str, tmp_path: Path) -> None:
    said = run(tmp_path, [plan], 2, sequences=2, length=8)
    assert len(said) == 2 and all(message in text for text in said), said


def test_killed_processes_resume_to_the_same_bits(tmp_path: Path) -> None:
    straight, resumed, journal = tmp_path / "straight", tmp_path / "resumed", tmp_path / "journal"
    assert run(straight, ["admm"], 2) == []
    assert len(run(resumed, ["admm"], 2, journal=journal, kill_after=2)) == 2
    assert (journal / "block_0000.record").is_file()  # the next one may still have been on its way to the disk
    assert run(resumed, ["admm"], 2, journal=journal) == []
    expected = load_tensors(straight / "admm" / "weights0.safetensors")
    for rank in (0, 1):
        found = load_tensors(resumed / "admm" / f"weights{rank}.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
