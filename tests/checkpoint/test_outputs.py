"""What a run may write over, what it leaves alone, and in which mode its files come out."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from lit_prune.checkpoint.files import replacing_folder, write_atomically
from lit_prune.checkpoint.masks import save_masks
from lit_prune.checkpoint.outputs import ANALYSIS, check_output, find_other
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import DiskError, InputError
from lit_prune.models.tokenizer import load_tokenizer


@pytest.fixture
def model(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Path:
    return save_pruned(
        tmp_path / "model", tiny_model(), load_tokenizer("random"), {}, {"plot.png": b"", "README.md": ""}
    )


@pytest.mark.parametrize(
    ("output", "reads", "said"),
    [
        ("model", ["model"], "it is or contains .*model', which this run reads"),
        (".", ["model"], "it is or contains"),
        ("link", ["model"], "it is or contains"),
        ("model", ["link"], "it is or contains"),
        ("model/out", ["model"], "it lies in"),
        ("model", ["model/config.json"], "it is or contains"),
    ],
)
def test_nothing_that_is_read_is_written_over(
    output: str, reads: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(InputError, match=said):
        check_output(tmp_path / output, overwrite=True, reads=[tmp_path / name for name in reads])


def test_a_dense_model_is_not_written_over(model: Path) -> None:
    (model / "masks.safetensors").unlink()
    message = r"it is a model without masks\.safetensors and pruning\.json, which lit-prune has not written"
    with pytest.raises(InputError, match=message):
        check_output(model, overwrite=True)


def test_only_a_result_of_the_same_kind_is_written_over(model: Path) -> None:
    assert check_output(model, overwrite=True, reads=["a/name-on-the-hub", "wikitext2"]) == model
    with pytest.raises(InputError, match="it exists and is kept"):
        check_output(model, overwrite=False)
    with pytest.raises(InputError, match=r"it holds no analysis\.json"):
        check_output(model, overwrite=True, kind=ANALYSIS)
    for name in ("thesis.tex", "data/part.safetensors", "adapter/notes"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).touch()
        with pytest.raises(InputError, match="which lit-prune has not written: move it elsewhere first"):
            check_output(model, overwrite=True)
        (model / name).unlink()
        if name.startswith("data"):
            (model / "data").rmdir()
    check_output(model, overwrite=True)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "output is empty"),
        ("/", "root of the file system"),
        ("x" * 5000, "a name may have 200 bytes"),
        ("a\0b", "none of them zero"),
        ("{at}/dangling", "a link to nothing"),
        ("{at}/file", "it is a file"),
        ("{at}/file/out", "is a file, so nothing can be in it"),
    ],
)
def test_what_cannot_be_a_folder_is_refused(output: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match=said) as raised:
        check_output(output.format(at=tmp_path), overwrite=True)
    assert len(str(raised.value)) < 500


def test_a_link_to_an_older_result_is_written_through(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert check_output(tmp_path / "link", overwrite=True) == model


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_leftovers_of_ended_runs_are_cleared_away(tmp_path: Path) -> None:
    ended = ended_process()
    mine, others = (
        tmp_path / f".o[x]*.writing-{ended}",
        [
            tmp_path / f".o[x]*.writing-{os.getppid()}",
            tmp_path / ".o[x]*.writing-backup",
            tmp_path / f".ox1.writing-{ended}",
        ],
    )
    for folder in (mine, *others):
        folder.mkdir()
    with replacing_folder(tmp_path / "o[x]*") as folder:
        (folder / "a").touch()
    assert not mine.exists() and all(folder.is_dir() for folder in others)
    assert (tmp_path / "o[x]*" / "a").is_file()


def test_a_run_that_is_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    aside = tmp_path / f".out.writing-{ended_process()}-old"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "old").is_file()


def test_a_result_that_cannot_take_its_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == "out":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with (
        pytest.raises(DiskError, match=r"the finished result is in '(.*)'") as raised,
        replacing_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").touch()
    assert (Path(str(raised.value).split("'")[-2]) / "a").is_file()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_modes_that_the_umask_gives(
    umask: int, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        folder = save_pruned(tmp_path / "out", tiny_model(), load_tokenizer("random"), {}, {})
        save_masks(tmp_path / "masks.safetensors", {})
        write_atomically(tmp_path / "text", lambda path: path.write_text(""))
    finally:
        os.umask(before)
    files = [file for file in (*folder.rglob("*"), tmp_path / "masks.safetensors", tmp_path / "text") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert not (folder / ".mode").exists()


def test_a_file_that_is_put_into_a_folder_while_it_is_replaced_is_kept(model: Path) -> None:
    def replace(meanwhile: str | None = None) -> None:
        with replacing_folder(model, find_other) as new:
            (new / "config.json").write_text("{}")
            if meanwhile:
                (model / meanwhile).write_text("mine")

    with pytest.warns(UserWarning, match=r"\.kept-\d+' is the former folder: it holds 'mine\.txt'"):
        replace("mine.txt")
    assert [file.name for file in model.iterdir()] == ["config.json"]
    replace()  # its clean-up leaves the former folder alone
    (kept,) = model.parent.glob(".*.kept-*")
    assert (kept / "mine.txt").read_text() == "mine"
