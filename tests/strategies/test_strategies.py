"""Masks hold in real processes, under every strategy: cells of the matrix of docs/masks.md, killed and sabotaged too.

DeepSpeed compiles a small operation for CPUs when it is first used, with g++ and ninja; the compiler is needed.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.cells import PLACES, STRATEGIES, cell_folder, difference, last_checkpoint, measure, start, train
from support.cells import run as run_cell
from support.sabotage import train_and_kill, train_and_leave_alone
from support.shared import Shared

ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
pytestmark = pytest.mark.timeout(900)  # two processes, and for DeepSpeed a compiler, on a machine that may be busy


@pytest.fixture(scope="session")
def run(shared: Shared) -> Callable[[str], dict[str, Any]]:
    """Run a cell, once for all tests, and return its figures."""

    def run(cell: str) -> dict[str, Any]:
        def make(folder: Path) -> None:
            (folder / "record.json").write_text(json.dumps(run_cell(cell, shared.folder / "cells")))

        strategy, rest = cell.split(" ", 1)
        if strategy != "single" and rest.startswith("32-true"):
            run(f"single {rest}")  # which its weights are compared with
        return json.loads((shared.once(f"record of {cell}", make) / "record.json").read_text())

    return run


def check_zeros(record: dict[str, Any]) -> None:
    assert "error" not in record, record
    held = [place for place in PLACES if place != "masters" or record["cell"].startswith(ZERO)]
    assert all(record[place][1] > 0 for place in held), record
    assert all(record[place][0] == 0 for place in PLACES), record


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
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
    error = start(cell, tmp_path, partial(train_and_leave_alone, part=left_alone))
    assert error is not None
    assert error.startswith("RuntimeError: model.layers.0.self_attn.q_proj.weight: "), error
    assert error.endswith(f" pruned weights are not zero in its {place}: the masks no longer hold"), error


def test_a_killed_and_resumed_run_equals_one_without_a_stop(
    run: Callable[[str], dict[str, Any]], shared: Shared, tmp_path: Path
) -> None:
    # Checkpoint after step 5, killed after step 8: in the middle of an epoch and between the prunings at 0 and 10.
    # test_cli_strategies.py does this with sharded checkpoints, and callbacks/test_callbacks.py with one process.
    cell = "DDP 32-true AdamW"
    check_zeros(run(cell))
    assert "-9" in str(start(cell, tmp_path, partial(train_and_kill, step=8)))
    assert not (tmp_path / "export").exists()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "step=5.ckpt"
    assert start(cell, tmp_path, partial(train, resume=checkpoint)) is None
    check_zeros({"cell": cell, **measure(cell, tmp_path)})
    straight = cell_folder(shared.folder / "cells", cell)
    assert difference(tmp_path / "export", straight / "export") < 1e-6
