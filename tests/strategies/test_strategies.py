"""Masks hold in real processes, under every strategy: cells of the matrix of docs/masks.md, killed and sabotaged too.

DeepSpeed compiles a small operation for CPUs when it is first used, with g++ and ninja; the compiler is needed.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import masks_matrix

RUNNER = str(Path(__file__).with_name("runner.py"))
ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
pytestmark = pytest.mark.timeout(900)  # two processes, and for DeepSpeed a compiler, on a machine that may be busy


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of results, which tests in parallel processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cells"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def run(out: Path) -> Callable[[str], dict[str, Any]]:
    """Run a cell, once for all tests, and return its figures."""

    def run(cell: str) -> dict[str, Any]:
        done = out / f"{cell}.json"
        with done.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.is_file():
                done.write_text(json.dumps(masks_matrix.run(cell, out)))
        return json.loads(done.read_text())

    return run


def check_zeros(record: dict[str, Any]) -> None:
    assert "error" not in record, record
    held = [place for place in masks_matrix.PLACES if place != "masters" or record["cell"].startswith(ZERO)]
    assert all(record[place][1] > 0 for place in held), record
    assert all(record[place][0] == 0 for place in masks_matrix.PLACES), record


@pytest.mark.parametrize("strategy", [name for name in masks_matrix.STRATEGIES if name != "single"])
def test_two_processes_hold_masks_and_train_as_one_does(strategy: str, run: Callable[[str], dict[str, Any]]) -> None:
    check_zeros(run("single 32-true AdamW"))
    record = run(f"{strategy} 32-true AdamW")
    check_zeros(record)
    assert record["difference"] < 1e-5


@pytest.mark.parametrize("cell", ["FSDP2 bf16-mixed SGD", "ZeRO-2 bf16-true SGD", "ZeRO-3 bf16-mixed AdamW"])
def test_masks_hold_in_half_precision(cell: str, run: Callable[[str], dict[str, Any]]) -> None:
    check_zeros(run(cell))


@pytest.mark.parametrize(
    ("cell", "left_alone", "place"),
    [
        ("single 32-true AdamW", "gradients", "weight"),
        ("single 32-true AdamW", "masters", "exp_avg"),
        ("FSDP2 32-true AdamW", "gradients", "weight"),
        ("ZeRO-2 bf16-true AdamW", "masters", "master"),
    ],
)
def test_the_audit_finds_what_is_left_alone(cell: str, left_alone: str, place: str, tmp_path: Path) -> None:
    error = masks_matrix.start(cell, tmp_path, (RUNNER, "--leave-alone", left_alone))
    assert error is not None
    assert error.startswith("RuntimeError: model.layers.0.self_attn.q_proj.weight: "), error
    assert error.endswith(f" pruned weights are not zero in its {place}: the masks no longer hold"), error


@pytest.mark.parametrize("strategy", ["single", "DDP", "ZeRO-3"])
def test_a_killed_and_resumed_run_equals_one_without_a_stop(
    strategy: str, run: Callable[[str], dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    # Checkpoint after step 5, killed after step 8: in the middle of an epoch and between the prunings at 0 and 10.
    cell = f"{strategy} 32-true AdamW"
    check_zeros(run(cell))
    assert masks_matrix.start(cell, tmp_path, (RUNNER, "--kill-after", "8")) is not None
    assert not (tmp_path / "export").exists()
    checkpoint = masks_matrix.last_checkpoint(tmp_path)
    assert checkpoint.name == "step=5.ckpt"
    assert masks_matrix.start(cell, tmp_path, (RUNNER, "--resume", str(checkpoint))) is None
    check_zeros({"cell": cell, **masks_matrix.measure(cell, tmp_path)})
    straight = masks_matrix.cell_folder(out, cell)
    assert masks_matrix.difference(tmp_path / "export", straight / "export") < 1e-6
