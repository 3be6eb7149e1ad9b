"""Two real processes prune one model together, and agree with one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_prune.models.files import load_tensors, read_json
from lit_prune.models.io import load_masks

pytestmark = pytest.mark.timeout(300)


PLANS = ["wanda", "sparsegpt", "gblm", "admm", "reconstructed", "dense"]


def run(out: Path, *arguments: str, processes: int = 1) -> list[str]:
    """Run the worker and return the last line of what each failed process said."""
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), "--out", str(out), *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        several = {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **(several if processes > 1 else {})}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [["", *process.communicate()[1].strip().splitlines()] for process in started]
    return [lines[-1] for process, lines in zip(started, said, strict=True) if process.returncode]


def masks(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    return {name: mask.unpack() for name, mask in load_masks(folder / f"masks{rank}.safetensors").items()}


# Sums over at most 320 tokens, in float64, and solves with matrices whose condition the damping keeps below 10,000.
ROUNDING = 320 * 1e4 * torch.finfo(torch.float64).eps
# Adam divides a gradient by its size plus 1e-8, so a gradient near zero carries its rounding there, at each step.
BY_ADAM = 6 * torch.finfo(torch.float64).eps / 1e-8


def check_equal(one: Path, other: Path, bound: float) -> None:
    """Check that masks are the same, and weights to within rounding; no two scores are as near as that."""
    theirs, values = masks(other), load_tensors(other / "weights0.safetensors")
    assert all(torch.equal(mask, theirs[name]) for name, mask in masks(one).items())
    for name, value in load_tensors(one / "weights0.safetensors").items():
        assert value.dtype == torch.float64
        assert (value - values[name]).norm() <= bound * value.norm(), name


def bound(plan: str) -> float:
    return BY_ADAM if plan == "reconstructed" else ROUNDING


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "FSDP2"])
def test_two_processes_agree_with_one(shard: list[str], tmp_path: Path) -> None:
    assert run(tmp_path / "one", *PLANS) == []
    assert run(tmp_path / "two", *PLANS, *shard, processes=2) == []
    for plan in PLANS:
        two = tmp_path / "two" / plan
        check_equal(tmp_path / "one" / plan, two, bound(plan))
        first, second = (load_tensors(two / f"weights{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert all(torch.equal(mask, masks(two, 1)[name]) for name, mask in masks(two).items())
        reports = [read_json(two / f"report{rank}.json") for rank in (0, 1)]
        assert reports[0]["layers"] == reports[1]["layers"]
        assert reports[0]["allocation"] == reports[1]["allocation"]


@pytest.mark.parametrize(
    ("plans", "arguments"),
    [
        (["wanda", "reconstructed"], ["--model", "mixtral"]),
        (["admm", "gblm", "reconstructed"], ["--sequences", "1", "--length", "128"]),
    ],
    ids=["experts", "a process without a sequence"],
)
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "FSDP2"])
def test_all_processes_are_heard(plans: list[str], arguments: list[str], shard: list[str], tmp_path: Path) -> None:
    assert run(tmp_path / "one", *plans, *arguments) == []
    assert run(tmp_path / "two", *plans, *arguments, *shard, processes=2) == []
    for plan in plans:
        check_equal(tmp_path / "one" / plan, tmp_path / "two" / plan, bound(plan))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("overflow", "output of model.layers.1 holds NaN or Inf on calibration batch 0"),
        ("singular", "the Gram matrix [32, 32] is not positive definite at damping 0"),
    ],
)
def test_what_fails_in_one_process_is_said_by_all(plan: str, message: str, tmp_path: Path) -> None:
    said = run(tmp_path, plan, "--sequences", "2", "--length", "8", processes=2)
    assert len(said) == 2 and all(message in text for text in said), said


def test_killed_processes_resume_to_the_same_bits(tmp_path: Path) -> None:
    straight, resumed, journal = tmp_path / "straight", tmp_path / "resumed", tmp_path / "journal"
    assert run(straight, "admm", processes=2) == []
    assert len(run(resumed, "admm", "--journal", str(journal), "--kill-after", "2", processes=2)) == 2
    assert (journal / "block_0000.record").is_file()  # the next one may still have been on its way to the disk
    assert run(resumed, "admm", "--journal", str(journal), processes=2) == []
    expected = load_tensors(straight / "admm" / "weights0.safetensors")
    for rank in (0, 1):
        found = load_tensors(resumed / "admm" / f"weights{rank}.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
