"""Runs of ``lit-prune prune`` that are stopped, in every way, go on to the same bits."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lit_prune import __main__ as entry
from lit_prune.checkpoint.masks import load_masks
from lit_prune.cli import main
from lit_prune.models.load import load_model
from support.processes import Started, on_a_full_disk, run

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    config = {
        "model": {
            "pretrained": "random",
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 12,
                "num_attention_heads": 4,
            },
        },
        "data": {"dataset": "embedded", "sequences": 8, "seqlen": 64, "max_windows": 4},
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [
                {
                    "class_path": "Prune",
                    "init_args": {
                        "plan": {
                            "pattern": {"class_path": "Unstructured", "init_args": {"sparsity": 0.5}},
                            "solver": {"class_path": "SparseGPT"},
                        }
                    },
                }
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return ["prune", "-c", str(folder / "run.yaml"), "--quiet"]


@pytest.fixture(scope="module")
def straight(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "out"
    assert main([*command, "--output", str(out)]) == 0
    return out


def check_resumed(command: list[str], out: Path, straight: Path) -> None:
    assert main([*command, "--output", str(out), "--resume", "auto"]) == 0
    expected = load_model(str(straight)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_model(str(out)).state_dict().items())
    masks = load_masks(straight)
    assert all(torch.equal(mask.bits, masks[name].bits) for name, mask in load_masks(out).items())
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_keeps_its_finished_blocks(
    number: signal.Signals, command: list[str], straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped = Started(tmp_path.with_suffix(".log"), partial(main, [*command, "--output", str(out)]))
    while not (tmp_path / ".out.journal" / "block_0001.record").exists():
        assert stopped.running, "the run ended before it could be stopped"
        time.sleep(0.002)
    stopped.signal(number)
    ended = stopped.wait()
    assert not out.exists()
    if number == signal.SIGKILL:
        assert ended.code == -9
    else:
        assert ended.code == 128 + number
        advice = "finished blocks are kept in"
        assert f"lit-prune: stopped by {number.name}; {advice}" in ended.said and "--resume auto" in ended.said
    assert (out.parent / ".out.journal" / "run.record").is_file()
    if number == signal.SIGKILL:  # it had no time to leave things in order
        check_resumed(command, out, straight)


@pytest.mark.parametrize("limit", [30_000, 300_000], ids=["a block", "the model"])
def test_a_full_disk_leaves_what_is_finished(limit: int, command: list[str], straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    target = partial(main, [*command, "--output", str(out)])
    ended = run(tmp_path.with_suffix(".log"), partial(on_a_full_disk, target, limit))
    assert ended.code == 2, ended.said
    line = ended.last_line
    assert line.startswith("lit-prune: error: ") and "cannot be written: " in line and "File too large" in line
    assert "finished blocks are kept" in line and line.endswith("--resume auto")
    assert not out.exists()
    blocks = len(list((tmp_path / ".out.journal").glob("block_*.record")))
    assert blocks == (0 if limit == 30_000 else 12)
    check_resumed(command, out, straight)


def test_finished_blocks_are_kept_unless_told_otherwise(
    command: list[str], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, journal = tmp_path / "out", tmp_path / ".out.journal"
    journal.mkdir()
    (journal / "run.record").write_text("nonsense")
    (journal / "block_0000.record").write_text("nonsense")
    assert main([*command, "--output", str(out), "--resume"]) == 2
    assert "run.record' is damaged; start again with --resume never" in capsys.readouterr().err
    assert main([*command, "--output", str(out)]) == 2
    assert "has 1 finished blocks of a stopped run: resume from them with --resume auto" in capsys.readouterr().err
    assert (journal / "block_0000.record").read_text() == "nonsense"
    assert main([*command, "--output", str(out), "--resume", "never"]) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_before_anything_runs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_prune.cli.main", interrupted)
    assert entry.main(["fit"]) == 130
    assert capsys.readouterr().err == "lit-prune: stopped by SIGINT\n"
