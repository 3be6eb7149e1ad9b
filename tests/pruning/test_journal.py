"""Runs that go on where another one stopped."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocators import AlphaPruning
from lit_prune.errors import DiskError, InputError
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction, journal, prune
from lit_prune.pruning.progress import OnProgress, Position
from lit_prune.reporting.report import versions
from lit_prune.scorers import Wanda
from lit_prune.solvers import ADMM, SparseGPT
from support.killed import KilledError, kill_at

TRAINED = PruningPlan(Unstructured(0.6), solver=ADMM(), correction=0.3, reconstruction=Reconstruction(40, rate=0.1))
PLANS = {
    "SparseGPT": (PruningPlan(Unstructured(0.5), solver=SparseGPT()), (2, "solve")),
    "corrected": (PruningPlan(NM(2, 4), solver=SparseGPT(), correction=0.5), (2, "solve")),
    "sequential": (
        PruningPlan(Unstructured(0.5), solver=SparseGPT(), correction=0.5, sequential=True, residual_correction=0.5),
        (2, "calibrate"),
    ),
    "trained, while it solves": (TRAINED, (1, "solve")),
    "trained, while it trains": (TRAINED, (1, "reconstruct")),
}
"""Plans, and the block and stage in which a run is killed."""


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("name", PLANS)
def test_a_killed_run_resumes_to_the_same_bits(
    model_type: str, name: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan, (block, stage) = PLANS[name]
    straight, resumed = tiny_model(model_type), tiny_model(model_type)
    expected = prune(straight, tokens, plan)

    with pytest.raises(KilledError):
        prune(tiny_model(model_type), tokens, plan, journal_folder=tmp_path, on_progress=kill_at(block, stage))
    stages: list[tuple[int, str]] = []
    options: Any = {"journal_folder": tmp_path, "on_progress": lambda p: stages.append((p.block, p.stage))}
    report = prune(resumed, tokens, plan, **options, resume=True)
    assert list(dict.fromkeys(s for s in stages if s[1] == "solve")) == [(left, "solve") for left in range(block, 3)]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    for layer, mask in expected.masks.items():
        assert torch.equal(mask.unpack(), report.masks[layer].unpack())
    assert [layer.reached for layer in report.layers] == [layer.reached for layer in expected.layers]
    errors = [[(done.before, done.after, done.vectors) for done in r.reconstructions] for r in (expected, report)]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_files_are_noticed_and_their_work_is_done_again(
    damage: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = PruningPlan(Unstructured(0.5), solver=SparseGPT(), allocator=AlphaPruning(), correction=0.3)
    straight = tiny_model()
    prune(straight, tokens, plan, journal_folder=tmp_path / "whole")
    files = sorted((tmp_path / "whole").iterdir())
    assert len(files) == 2 + 2 * 3
    for index, file in enumerate(files):
        journal = shutil.copytree(tmp_path / "whole", tmp_path / str(index))
        content = bytearray((journal / file.name).read_bytes())
        content[len(content) * 2 // 3] ^= 1
        (journal / file.name).write_bytes(content if damage == "flip" else content[:-1])
        if damage == "remove":
            (journal / file.name).unlink()
        model, solved = tiny_model(), set()

        def note(position: Position, solved: set[int] = solved) -> None:
            solved |= {position.block} if position.stage == "solve" else set()

        def resume(model: nn.Module = model, journal: Path = journal, note: OnProgress = note) -> None:
            prune(model, tokens, plan, journal_folder=journal, resume=True, on_progress=note)

        if file.name == "run.record" and damage != "remove":
            with pytest.raises(InputError, match=r"cannot resume: .*run\.record' is damaged; start again"):
                resume()
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            resume()
        if file.name == "run.record":
            assert solved == {0, 1, 2}  # nobody knows what it is the journal of
        else:
            assert solved == ({int(file.stem[-1])} if file.name.startswith("block") else set())
        told = [str(warning.message) for warning in said if "is damaged: its work is repeated" in str(warning.message)]
        expected_said = damage != "remove" or file.suffix == ".safetensors"
        assert bool(told) == expected_said, (file.name, told)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in straight.state_dict().items())


def test_resuming_something_else_is_refused_and_named(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PruningPlan(Unstructured(0.5), Wanda())
    prune(tiny_model(), tokens, plan, journal_folder=tmp_path)
    with pytest.raises(InputError, match=r"plan\.pattern\.init_args\.sparsity was 0\.5 and is now 0\.6"):
        prune(tiny_model(), tokens, plan.at(0.6), journal_folder=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"plan\.reconstruction was None and is now"):
        prune(
            tiny_model(),
            tokens,
            replace(plan, reconstruction=TRAINED.reconstruction),
            journal_folder=tmp_path,
            resume=True,
        )
    with pytest.raises(InputError, match="data was"):
        prune(tiny_model(), tokens[:1], plan, journal_folder=tmp_path, resume=True)
    with pytest.raises(InputError, match="model was"):
        prune(tiny_model(seed=1), tokens, plan, journal_folder=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"versions\.torch was '.*' and is now '0'"), monkeypatch.context() as patch:
        patch.setattr("lit_prune.pruning.journal.versions", lambda: {**versions(), "torch": "0"})
        prune(tiny_model(), tokens, plan, journal_folder=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"sparsity was None and is now 0\.3"):
        prune(tiny_model(), tokens, plan, journal_folder=tmp_path, resume=True, sparsity=0.3)
    with pytest.raises(InputError, match=r"autocast was None and is now 'bfloat16'"):
        half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
        prune(tiny_model(), tokens, plan, journal_folder=tmp_path, resume=True, forward_context=half)
    prune(tiny_model(), tokens, plan.at(0.6), journal_folder=tmp_path)  # without resume it starts afresh


def test_a_last_block_that_cannot_be_written_is_an_error(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = journal.save_tensors

    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        if "0002" in path.name:
            raise DiskError("no space left")
        save(path, tensors)

    monkeypatch.setattr(journal, "save_tensors", full)
    with pytest.raises(DiskError, match="no space left"):
        prune(tiny_model(), tokens, PruningPlan(Unstructured(0.6), Wanda()), journal_folder=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("block_*.record")) == ["block_0000.record", "block_0001.record"]


def test_blocks_of_another_run_are_not_taken_for_ones_own(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    mine, theirs = (PruningPlan(Unstructured(sparsity), Wanda()) for sparsity in (0.7, 0.5))
    prune(tiny_model(), tokens, mine, journal_folder=tmp_path / "mine")
    prune(tiny_model(), tokens, theirs, journal_folder=tmp_path / "theirs")
    for name in ("block_0001.record", "block_0001.safetensors"):
        (tmp_path / "theirs" / name).replace(tmp_path / "mine" / name)
    with pytest.warns(UserWarning, match="is of another run: the block is pruned again"):
        report = prune(tiny_model(), tokens, mine, journal_folder=tmp_path / "mine", resume=True)
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("content", [[], {"layers": []}, "text", None])
def test_a_record_that_is_no_record_is_damage(
    content: object, tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = PruningPlan(Unstructured(0.5), Wanda())
    straight = prune(tiny_model(), tokens, plan, journal_folder=tmp_path)
    journal._write_record(tmp_path / "block_0001.record", content)
    again = prune(tiny_model(), tokens, plan, journal_folder=tmp_path, resume=True)
    assert [layer.reached for layer in again.layers] == [layer.reached for layer in straight.layers]


def test_only_its_own_files_are_removed_with_a_journal(tmp_path: Path) -> None:
    own = ["run.record", "allocation.record", "block_0001.record", "block_0001.safetensors", ".run.record.writing-7"]
    others = ["block_notes", "my.record", "block_9"]
    for name in (*own, *others):
        (tmp_path / name).touch()
    journal.Journal.remove(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)
