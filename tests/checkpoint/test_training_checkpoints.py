"""Checkpoints are read whole or sharded, and nothing in them is run."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import save

from lit_prune.checkpoint.training_checkpoints import check_is_checkpoint, check_trusted, read_checkpoint
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def weights() -> dict[str, Tensor]:
    return {"model.layer.weight": torch.arange(6.0).reshape(2, 3), "metric": torch.ones(1)}


def callbacks(name: str = "Prune") -> dict[str, Any]:
    mask = PackedMask.pack(weights()["model.layer.weight"] > 2)
    key = "layer" if name == "Prune" else "layer.weight"
    return {f"{name}{{'x': 1}}": {"masks": {key: mask.bits}, "mask_shapes": {key: [2, 3]}}}


def write_file(path: Path, **more: Any) -> Path:
    torch.save({"state_dict": weights(), "callbacks": callbacks(), **more}, path)
    return path


def write_sharded(path: Path) -> Path:
    save({"state_dict": weights(), "optimizer_0": {"moment": torch.ones(3)}}, checkpoint_id=path, no_dist=True)
    torch.save({"callbacks": callbacks()}, path / "meta.pt")
    return path


@pytest.mark.parametrize("write", [write_file, write_sharded])
def test_weights_and_masks_come_back(write: Any, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path / "last.ckpt"))
    assert list(checkpoint.weights) == ["layer.weight"]  # neither metrics nor optimizer moments
    assert torch.equal(checkpoint.weights["layer.weight"], torch.arange(6.0).reshape(2, 3))
    assert checkpoint.masks["layer.weight"].unpack().tolist() == [[False] * 3, [True] * 3]


def test_masks_of_keep_masks_count_where_it_has_its_own(tmp_path: Path) -> None:
    file = write_file(tmp_path / "last.ckpt", callbacks=callbacks("KeepMasks"))
    assert list(read_checkpoint(file).masks) == ["layer.weight"]
    with pytest.raises(InputError, match="the checkpoint holds no masks"):
        _ = read_checkpoint(write_file(tmp_path / "none.ckpt", callbacks={})).masks


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = write_file(tmp_path / "last.ckpt", extra=Evil(mark))
    with pytest.raises(InputError, match=r"last\.ckpt holds more than tensors and plain data.*--trust"):
        read_checkpoint(file)
    assert not mark.exists()
    read_checkpoint(file, trust=True)
    assert mark.exists()


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_folder_with_code_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = write_sharded(tmp_path / "last.ckpt")
    if name == ".metadata":
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save(Evil(mark), folder / name)
    with pytest.raises(InputError, match="holds more than tensors and plain data"):
        read_checkpoint(folder)
    assert not mark.exists()


CONTENT = {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 3, "loops": {}}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("epoch", -5, "epoch or global_step is negative"),
        ("global_step", "x", "'global_step' is a str"),
        ("loops", None, "'loops' is a NoneType"),
        ("state_dict", [1], "'state_dict' is a list"),
        ("state_dict", {7: torch.ones(2)}, "7 is not a dense tensor"),
        ("state_dict", {"model.a": torch.eye(2).to_sparse()}, "'model.a' is not a dense tensor"),
        ("callbacks", [], "'callbacks' is a list"),
        ("optimizer_states", {}, "'optimizer_states' is a dict"),
        ("steppers", 3, "'steppers' is a int"),
        ("pytorch-lightning_version", 3, "'pytorch-lightning_version' is a int"),
        ("pytorch-lightning_version", "banana", "its version 'banana' is not 2 or later"),
        ("pytorch-lightning_version", "0.1.0", "its version '0.1.0' is not 2 or later"),
    ],
)
def test_content_of_another_kind_is_refused(name: str, value: Any, said: str, tmp_path: Path) -> None:
    check_is_checkpoint(write_file(tmp_path / "whole.ckpt", **CONTENT))
    with pytest.raises(InputError, match=rf"whole\.ckpt': it is not one of Lightning \(.*{re.escape(said)}"):
        check_is_checkpoint(write_file(tmp_path / "whole.ckpt", **{**CONTENT, name: value}))


def test_a_tensor_with_a_gap_between_its_chunks_is_refused(tmp_path: Path) -> None:
    """torch would leave what was in memory there."""
    folder = write_sharded(tmp_path / "last.ckpt")
    index = pickle.loads((folder / ".metadata").read_bytes())
    (chunk,) = index.state_dict_metadata["state_dict.model.layer.weight"].chunks
    chunk.sizes = torch.Size([1, 3])
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match=r"the chunks of state_dict\.model\.layer\.weight hold 3 of its 6 values"):
        read_checkpoint(folder)
    chunk.offsets = torch.Size([2, 0])
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match=r"a chunk of .* is outside of the tensor"):
        read_checkpoint(folder)


@pytest.mark.parametrize("named", ["torch.load", "torch.hub.load", "builtins.eval", "pathlib.os", "nowhere.nothing"])
def test_metadata_names_no_function(named: str, tmp_path: Path) -> None:
    module, name = named.rsplit(".", 1)
    folder = write_sharded(tmp_path / "last.ckpt")
    (folder / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(InputError, match=f"it names {named}"):
        check_trusted(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file, and no folder with a checkpoint in it"):
        read_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.ckpt holds more than tensors and plain data, or is damaged"):
        read_checkpoint(tmp_path / "empty.ckpt")
    torch.save({}, tmp_path / "some.pt")
    with pytest.raises(InputError, match="holds no checkpoint of FSDP2 or DeepSpeed"):
        read_checkpoint(tmp_path)
