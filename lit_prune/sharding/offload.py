"""Disk offload: a block is read from safetensors files for computation, and written back if it has changed.

Parameters outside the blocks are in memory, except untied embeddings and heads, which are read like a block when they
are called. An offloaded model runs like any other, one block at a time: it needs the memory of one block, and each
forward pass reads the whole model.
"""

from __future__ import annotations

import atexit
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.checkpoint.configs import load_generation_config, read_config, save_configs
from lit_prune.checkpoint.files import as_json, load_tensors, read_json, save_tensors, tensor_names, tensor_shapes
from lit_prune.checkpoint.folders import check_folder
from lit_prune.checkpoint.locks import locked
from lit_prune.errors import InputError
from lit_prune.malloc import give_back_freed_memory
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.experts import has_fused_experts
from lit_prune.models.weights import check_finite, ignored_by, refuse
from lit_prune.sharding.block_store import BlockStore, fill_outside_blocks, store_of
from lit_prune.sharding.parameters import persistent_buffers

_CHANGED = re.compile(r"block_\d{4,}\.safetensors|\.block_\d{4,}\.safetensors\.writing-\d+")
"""File names in the folder of changed blocks."""
_CLAIMED: dict[Path, ExitStack] = {}
"""Folders of changed blocks that this process has locked."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class OnDisk(BlockStore):
    """Store for blocks in the files of a checkpoint, with changed blocks in a separate folder."""

    prefetches = True
    low_memory = True

    def __init__(self, sources: Mapping[str, tuple[Path, str]], changes: Path, ends: Sequence[Block]) -> None:
        """Initialize with the files of the weights.

        Args:
            sources: file of every parameter, and the name within it, by name in the model.
            changes: folder for changed blocks; those of an earlier run are removed.
            ends: modules before and after the blocks to offload as well.
        """
        super().__init__()
        self._ends = ends
        self._sources = sources
        _claim(changes)
        self._finite: set[str] = set()
        self._changes = changes
        self._drop()

    def parts(self, model: nn.Module) -> list[Block]:
        """Return the blocks, then embeddings and head if they are offloaded as well."""
        return [*super().parts(model), *self._ends]

    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """Read the block, with changes applied."""
        parameters = dict(block.module.named_parameters())
        changed = self._file(block)
        found = load_tensors(changed) if changed.is_file() else {}
        for name in parameters.keys() - found.keys():
            found[name] = self.read(f"{block.name}.{name}")
        return {name: found[name].to(device, parameter.dtype) for name, parameter in parameters.items()}

    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Write the changed parameters to the folder of changed blocks."""
        file = self._file(block)
        earlier = load_tensors(file) if file.is_file() else {}
        save_tensors(file, {**earlier, **{name: value.cpu() for name, value in values.items()}})

    def read(self, name: str) -> Tensor:
        """Return a parameter as stored in the checkpoint; raise ``InputError`` if it contains NaN or Inf."""
        file, there = self._sources[name]
        with safe_open(file, framework="pt") as handle:
            values: Tensor = handle.get_tensor(there).clone()  # a view would keep the whole file in memory
        if name not in self._finite:
            check_finite(name, values, repr(str(file)))
            self._finite.add(name)
        return values

    def forget(self) -> None:
        """Remove the files of changed blocks, and their folder if that leaves it empty; unlock it for other runs."""
        self._drop()
        if self._changes.is_dir() and not any(self._changes.iterdir()):
            self._changes.rmdir()
        _CLAIMED.pop(self._changes.resolve(), ExitStack()).close()

    def _prefetch(self, block: Block, device: torch.device) -> None:
        """Read a block in another thread; on CPUs only into the page cache, because only one block is to be in memory.

        Errors are not raised here, but when the block is loaded.
        """
        if device.type == "cpu":
            self._in_background(self._read_through, block)
        else:
            super()._prefetch(block, device)

    def _read_through(self, block: Block) -> None:
        changed = self._file(block)
        elsewhere = tensor_names(changed) if changed.is_file() else set()
        for name in dict(block.module.named_parameters()).keys() - elsewhere:
            self.read(f"{block.name}.{name}")

    def _drop(self) -> None:
        for file in [*self._changes.glob("block_*.safetensors"), *self._changes.glob(".block_*.writing-*")]:
            file.unlink(missing_ok=True)  # another process may have removed it

    def _file(self, block: Block) -> Path:
        return self._changes / f"block_{block.index:04d}.safetensors"


def open_lazily(
    pretrained: str | Path, changes: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Open a causal language model that stays on disk, in evaluation mode.

    Args:
        pretrained: Hugging Face folder with safetensors files, or the name of a model on the hub.
        changes: folder for changed blocks, for one model at a time.
        dtype: dtype of the weights; None = as in the model's config.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        InputError: if there are no such files, if their names or shapes do not match the model, or if ``changes``
            contains other files.
    """
    folder = Path(pretrained).expanduser()
    if folder.is_file() or str(pretrained) == "random":
        raise InputError(
            f"model.pretrained is {str(pretrained)!r}: model.lazy opens folders with safetensors files only"
        )
    changes = Path(changes).expanduser()
    _check_changes(changes)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(pretrained), allow_patterns=["*.json", "*.safetensors", "*.py", "*.model"]))
    check_folder(folder, str(pretrained))
    give_back_freed_memory()
    files = _files(folder)
    config = read_config(folder, str(pretrained), trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # so far, each tied name has a separate empty parameter
    if has_fused_experts(model):
        raise InputError(f"{str(pretrained)!r} has fused experts, which have to be loaded whole: leave model.lazy out")
    buffers = persistent_buffers(model)
    expected = {name: list(t.shape) for name, t in (*model.named_parameters(), *buffers.items())}
    store = OnDisk(_matched(model, expected, files, str(pretrained)), changes, _ends(model))
    fill_outside_blocks(model, store, store.read)
    for name, buffer in buffers.items():
        buffer.data = store.read(name).to(buffer.dtype)
    for block in store.parts(model):
        block.module.register_forward_pre_hook(_holder(store, block))
        block.module._apply = _placeholders_moved(store, block)  # type: ignore[method-assign]
    load_generation_config(folder, model)
    return model.eval()


def disk_store_of(model: nn.Module) -> OnDisk | None:
    """Return the store of an offloaded model; None for any other model."""
    store = model.__dict__.get("block_store")
    return store if isinstance(store, OnDisk) else None


def names_on_disk(model: nn.Module) -> list[str]:
    """Return the names of the parameters of an offloaded model that are read from disk."""
    parts = store_of(model).parts(model)
    return [name for part in parts for name, _ in part.module.named_parameters(prefix=part.name)]


@torch.no_grad()
def save_lazily(folder: Path, model: Any, disk: OnDisk) -> None:
    """Write an offloaded model as a Hugging Face folder, with a file per block and one for all other parameters."""
    parts = disk.parts(model)
    count, weights, size = len(parts) + 1, {}, 0
    within = tuple(f"{part.name}." for part in parts)

    def write(index: int, tensors: dict[str, Tensor]) -> int:
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"}
        )
        weights.update(dict.fromkeys(tensors, file))
        return sum(tensor.nbytes for tensor in tensors.values())

    outside = {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith(within)}
    first_name = {id(tensor): name for name, tensor in reversed(outside.items())}  # tied weights are written once
    size += write(0, {name: tensor.detach() for name, tensor in outside.items() if first_name[id(tensor)] == name})
    for part in parts:
        with disk.resident(part):
            size += write(part.index + 1, part.module.state_dict(prefix=f"{part.name}."))
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (folder / _INDEX).write_text(as_json(index), encoding="utf-8")
    save_configs(folder, model)


def _claim(changes: Path) -> None:
    """Lock a folder of changed blocks against other runs, until this process ends or calls ``forget``."""
    folder = changes.resolve()
    if folder in _CLAIMED or not _is_first_process():
        return
    refusal = f"model.lazy is {str(changes)!r}: another run keeps its blocks there; name another folder"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = ExitStack()
    lock.enter_context(locked(folder.with_name(f".{folder.name}.lock"), refusal))
    _CLAIMED[folder] = lock
    atexit.register(lock.close)


def _is_first_process() -> bool:
    """Return whether this is the first process of a launch, before torch.distributed is initialized."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _check_changes(folder: Path) -> None:
    """Raise ``InputError`` if a folder contains anything other than changed blocks of an earlier run."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if not _CHANGED.fullmatch(file.name):
            raise InputError(
                f"model.lazy is {str(folder)!r}: it holds {file.name!r}, and blocks that lie there are dropped; name a "
                "folder of its own"
            )


def _ends(model: Any) -> list[Block]:
    """Return embeddings and head as additional blocks, unless their weights are tied."""
    used = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    own = [(name, module) for name, module in model.named_modules() if module in ends and used[id(module.weight)] == 1]
    return [Block(index, name, module) for index, (name, module) in enumerate(own, len(find_blocks(model)))]


def _files(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Return the file and the shape of every tensor of a checkpoint, by its name in the checkpoint."""
    if (folder / _INDEX).is_file():
        named = read_json(folder / _INDEX)["weight_map"]
        shapes = {file: tensor_shapes(folder / file) for file in set(named.values())}
        for name, file in named.items():
            if name not in shapes[file]:
                raise InputError(f"{str(folder / file)!r} lacks {name}, which is there according to {_INDEX}")
        return {name: (folder / file, shapes[file][name]) for name, file in named.items()}
    if (folder / _SINGLE).is_file():
        return {name: (folder / _SINGLE, shape) for name, shape in tensor_shapes(folder / _SINGLE).items()}
    raise InputError(
        f"model.pretrained is {str(folder)!r}: it has neither {_SINGLE} nor {_INDEX}, so it cannot be opened lazily; "
        "export it once with --to hf-sharded"
    )


def _matched(
    model: Any, expected: Mapping[str, list[int]], files: Mapping[str, tuple[Path, list[int]]], pretrained: str
) -> dict[str, tuple[Path, str]]:
    """Return the file of every weight and its name there; raise ``InputError`` for files of another model."""
    prefix = f"{model.base_model_prefix}."  # checkpoints without a head lack this prefix
    matched, mismatched = {}, []
    for name, shape in expected.items():
        there = next((known for known in (name, name.removeprefix(prefix)) if known in files), None)
        if there is None:
            raise InputError(
                f"model.pretrained is {pretrained!r}: no file has {name!r}, so it cannot be opened lazily; load it "
                "whole, and export it once with --to hf-sharded"
            )
        matched[name] = (files[there][0], there)
        if files[there][1] != shape:
            mismatched.append(f"{name} {files[there][1]}, and not {shape}")
    refuse(pretrained, "holds {}, as its config says", mismatched)
    known = {*model.state_dict(), *(there for _, there in matched.values())}  # a tied weight may be stored as well
    others = [name for name in files if not {name, f"{prefix}{name}"} & known and not ignored_by(model, name)]
    refuse(pretrained, "holds {}, which a model of its config does not have", others)
    return matched


def _holder(store: BlockStore, block: Block) -> Callable[..., None]:
    def hold(module: nn.Module, args: object) -> None:
        if "forward" not in module.__dict__:  # else its forward is replaced, and the replacement loads weights itself
            store.hold(block)

    return hold


def _placeholders_moved(store: BlockStore, block: Block) -> Callable[..., nn.Module]:
    """Return an ``_apply`` that moves a block without allocating its placeholders in full size."""

    def apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        store.release()
        for parameter in block.module.parameters():
            one = parameter.data[(0,) * parameter.dim()].clone()
            parameter.data = function(one).expand(parameter.shape)
        for buffer in block.module.buffers():
            buffer.data = function(buffer.data)
        return block.module

    return apply
