"""Read untrusted training checkpoints, sharded or not, without running code from them.

Unless a checkpoint is trusted, every file to load is checked first: ``.pt`` files and single-file checkpoints with
torch's weights-only unpickler, the ``.metadata`` of a sharded checkpoint with an unpickler restricted to its classes,
and each entry of a ``.distcp`` file that is not a tensor as a separate weights-only file. Links, paths in
``.metadata`` and DeepSpeed's ``latest`` must not lead outside the checkpoint's folder.

This check only provides the error message. The protection is in the load itself, in which every library uses the same
unpicklers (``plain_data_only``).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from lit_prune.errors import InputError, damage, first_line
from lit_prune.ops import PackedMask
from lit_prune.ops.masks import restored_masks

_METADATA = ".metadata"
"""Pickled index of a folder written by torch.distributed.checkpoint."""
_EXTRA = "meta.pt"
"""File that Lightning adds to such a folder, with loops, callbacks and hyper-parameters."""
_DEEPSPEED_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""Classes of plain data that DeepSpeed pickles in addition to tensors."""
_METADATA_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "pathlib": ("PosixPath", "WindowsPath"),
}
"""All classes that an index refers to. None of them can be used in place of a dict with methods of its own."""
_DTYPES = (torch.dtype, torch.layout, torch.memory_format)
_FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
"""Environment variables of torch that override ``weights_only`` of every caller; setting both is an error."""
_LATEST = "latest"
"""DeepSpeed's file with the folder name of the newest checkpoint."""
_CONTENT: dict[str, Any] = {"pytorch-lightning_version": str, "epoch": int, "global_step": int, "loops": dict}
_WEIGHTS: dict[str, Any] = {"state_dict": Mapping}
_STATES: dict[str, Any] = {"callbacks": dict, "optimizer_states": list, "lr_schedulers": list, "steppers": dict}
"""Types of the entries of a checkpoint; it may lack ``_STATES``."""
_VERSION = re.compile(r"([2-9]|\d\d)\.\d")
_MODEL = "model."
"""Prefix of the names of the language model's weights in a LitCausalLM."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a training checkpoint that an export needs."""

    weights: dict[str, Tensor]
    """Full weights of the language model by name, in CPU memory; float32 masters if there are any."""
    callbacks: dict[str, Any]
    """State of every callback, by class name."""

    @property
    def masks(self) -> dict[str, PackedMask]:
        """Keep masks by parameter name."""
        for name, suffix in (("KeepMasks", ""), ("Prune", ".weight")):
            state = self.callbacks.get(name, {})
            try:
                if state.get("masks"):
                    masks = restored_masks(state["masks"], state["mask_shapes"])
                    return {f"{name}{suffix}": mask for name, mask in masks.items()}
            except (InputError, AttributeError, KeyError, TypeError) as error:
                raise InputError(f"the checkpoint's masks, of {name}, are damaged ({damage(error)})") from error
        raise InputError(
            "the checkpoint holds no masks: neither Prune nor KeepMasks was among the callbacks, or "
            "ModelCheckpoint.save_weights_only is on"
        )


def read_checkpoint(path: str | Path, trust: bool = False) -> Checkpoint:
    """Read a Lightning checkpoint: one file, or the folder of FSDP2 or of DeepSpeed ZeRO-1, -2 or -3.

    Args:
        path: file or folder of the checkpoint.
        trust: load the checkpoint even if it contains more than plain data, which may run code.

    Raises:
        InputError: if there is no such checkpoint, or it contains code and is not trusted.
    """
    path = Path(path).expanduser()
    check_trusted(path, trust)
    try:
        with nullcontext() if trust else plain_data_only(path):
            if path.is_file():
                content = _load(path, trust)
                weights, extra = content["state_dict"], content
            elif (path / _METADATA).is_file():
                weights, extra = _read_sharded(path), _load(path / _EXTRA, trust)
            else:
                weights, extra = _read_deepspeed(path), _load(_model_states(path)[0], trust)
        weights = {name.removeprefix(_MODEL): value for name, value in weights.items() if name.startswith(_MODEL)}
        callbacks = {key.split("{")[0]: state for key, state in extra.get("callbacks", {}).items()}
    except (AttributeError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"checkpoint is {str(path)!r}: it is not a checkpoint of Lightning, or damaged ({damage(error)})"
        ) from error
    return Checkpoint(weights, callbacks)


def by_layer(masks: Mapping[str, PackedMask]) -> dict[str, PackedMask]:
    """Return masks by layer name instead of parameter name."""
    return {name.removesuffix(".weight"): mask for name, mask in masks.items()}


def check_trusted(path: str | Path, trust: bool = False) -> None:
    """Raise ``InputError`` if a checkpoint does not exist, or contains more than plain data and is not trusted.

    Files are read with unpicklers restricted to tensors and plain data; other names in them are never imported.
    """
    path = Path(path).expanduser()
    try:
        files = _files(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"checkpoint is {str(path)[:200]!r}: it cannot be read ({first_line(error)})") from error
    if not files:
        raise InputError(f"checkpoint is {str(path)!r}: there is no such file, and no folder with a checkpoint in it")
    if trust:
        return
    for file in files:
        try:
            _check_file(file)
        except InputError:
            raise
        except Exception as error:  # a damaged pickle can raise any type
            raise InputError(
                f"checkpoint is {str(path)!r}: {file.name} holds more than tensors and plain data, or is damaged "
                f"({first_line(error)}); if you trust its origin, add --trust"
            ) from error


def check_is_checkpoint(path: str | Path, trust: bool = False) -> None:
    """Raise ``InputError`` if a file, or the file that Lightning adds to a sharded one, is not a checkpoint of it."""
    path = Path(path).expanduser()
    file = path if path.is_file() else path / _EXTRA
    if not file.is_file():
        return  # a folder of DeepSpeed
    try:
        reason = _fault(_load(file, trust), whole=file == path)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = first_line(error)
    if reason:
        raise InputError(f"checkpoint is {str(path)!r}: it is not one of Lightning ({reason})")


def _fault(content: Any, whole: bool) -> str:
    """Return the reason why content is not that of a checkpoint; empty if it is.

    Args:
        content: content of the file.
        whole: whether the file is the whole checkpoint, with the weights.
    """
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    needed = _CONTENT | _WEIGHTS if whole else _CONTENT
    if lacking := [name for name in needed if name not in content]:
        return f"{lacking[0]!r} is missing"
    for name, kind in (needed | _STATES).items():
        if name in content and not isinstance(content[name], kind):
            return f"{name!r} is a {type(content[name]).__name__}"
    if content["epoch"] < 0 or content["global_step"] < 0:
        return "its epoch or global_step is negative"
    if not _VERSION.match(content["pytorch-lightning_version"]):
        return f"its version {content['pytorch-lightning_version']!r:.40} is not 2 or later"
    weights = content["state_dict"].items() if whole else ()
    return next((f"{name!r:.200} is not a dense tensor" for name, value in weights if not _is_weight(name, value)), "")


def _is_weight(name: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and dense


def check_kept_paths(states: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if a restored ``ModelCheckpoint`` could delete files outside its folder.

    Lightning deletes older checkpoints whose path, as text, starts with the checkpoints' folder; a path with ``..``
    can lead outside.

    Args:
        states: states of the callbacks in a checkpoint.
    """
    for state in states.values():
        if not isinstance(state, Mapping):
            continue
        kept = state.get("best_k_models", {})
        single = [state.get(f"{name}_model_path") for name in ("best", "kth_best", "last")]
        for name in [*(kept if isinstance(kept, Mapping) else ()), *single]:
            if isinstance(name, str) and ".." in Path(name).parts:
                raise InputError(f"the checkpoint names {name!r} as its own file: '..' must not lead out of its folder")


def _files(path: Path) -> list[Path]:
    """Return the files of a checkpoint that are unpickled when it is loaded."""
    return [path] if path.is_file() else [file for file in _files_of(path) if _is_loaded(file)]


def _files_of(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; raise ``InputError`` if a link or ``latest`` leads outside it."""
    root = folder.resolve()
    for parent, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise InputError(
                    f"checkpoint is {str(folder)!r}: {str(path.relative_to(root))!r} is a link to "
                    f"{str(path.resolve())!r}, outside of it; copy its target into the folder"
                )
        yield from (Path(parent, name) for name in names)
    latest = root / _LATEST
    if latest.is_file():
        tag = latest.read_text(errors="replace").strip()
        if "\0" in tag or not (root / tag).resolve().is_relative_to(root):
            raise InputError(f"checkpoint is {str(folder)!r}: its {_LATEST!r} names {tag!r}, outside of it")


def _is_loaded(file: Path) -> bool:
    """Return whether a file is unpickled directly on loading its folder; ``.distcp`` files are read via their index."""
    return file.suffix == ".pt" or file.name.endswith(_METADATA)


def _check_file(file: Path) -> None:
    """Raise an error if a file contains anything other than tensors and plain data."""
    if file.name.endswith(_METADATA):
        with file.open("rb") as handle:
            _check_entries(file, _MetadataUnpickler(handle).load())
    else:
        _load(file)


def _check_entries(index: Path, metadata: Any) -> None:
    """Raise an error if a sharded checkpoint's index is invalid or leads outside its folder, or an entry has code."""
    tables = (getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None))
    if type(metadata) is not Metadata or not all(type(table) is dict for table in tables):
        raise pickle.UnpicklingError("it is not an index of a sharded checkpoint")
    files = set()
    for entry, place in metadata.storage_data.items():
        if type(entry) is not MetadataIndex or type(place) is not _StorageInfo or type(place.relative_path) is not str:
            raise pickle.UnpicklingError("it is not an index of a sharded checkpoint")
        file = index.parent / place.relative_path
        if not file.resolve().is_relative_to(index.parent.resolve()):
            raise pickle.UnpicklingError(f"it leads to {place.relative_path!r}, outside of the folder")
        if not file.is_file():
            raise pickle.UnpicklingError(f"{place.relative_path!r} is missing")
        files.add(file)
        if isinstance(metadata.state_dict_metadata.get(entry.fqn), BytesStorageMetadata):
            _check_bytes(entry.fqn, file, place)
    entries = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    needed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries)
    if needed > (there := sum(file.stat().st_size for file in files)):
        raise pickle.UnpicklingError(f"its tensors would take {needed:,} bytes, and its files have {there:,}")
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_chunks(name, entry)


def _check_chunks(name: str, entry: TensorStorageMetadata) -> None:
    """Raise an error if the chunks of a tensor do not cover it: what is between them would keep an arbitrary value."""
    covered = 0
    for chunk in entry.chunks:
        ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if not all(0 <= start <= end <= size for start, end, size in zip(chunk.offsets, ends, entry.size, strict=True)):
            raise pickle.UnpicklingError(f"a chunk of {name} is outside of the tensor")
        covered += math.prod(chunk.sizes)
    if covered != math.prod(entry.size):
        raise pickle.UnpicklingError(f"the chunks of {name} hold {covered:,} of its {math.prod(entry.size):,} values")


def _check_bytes(name: str, file: Path, place: Any) -> None:
    """Raise an error if an entry that is not a tensor contains code."""
    if getattr(place, "transform_descriptors", None):
        raise pickle.UnpicklingError(f"{name} is compressed")
    if not (place.offset >= 0 and 0 <= place.length <= file.stat().st_size - place.offset):
        raise pickle.UnpicklingError(f"{name} is not all in {place.relative_path}")
    with file.open("rb") as handle:
        handle.seek(place.offset)
        content = handle.read(place.length)
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise pickle.UnpicklingError(f"{name} in {place.relative_path}: {first_line(error)}") from error


@contextmanager
def plain_data_only(path: str | Path) -> Iterator[None]:
    """Restrict every library that loads a checkpoint within this context to tensors and plain data.

    torch's loader of shards and DeepSpeed unpickle arbitrary classes even with ``weights_only``.

    Args:
        path: checkpoint to load, which is checked first.

    Raises:
        InputError: if there is no such checkpoint, or it contains more than plain data.
    """
    check_trusted(path)
    known = [_class(*name) for file in _files(Path(path).expanduser()) for name in _wanted(file)]
    before = {name: os.environ.pop(name, None) for name in _FORCED}
    read_metadata = FileSystemReader.read_metadata
    try:
        os.environ[_FORCED[0]] = "1"  # torch.load obeys it regardless of its arguments
        FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign, assignment]
        with torch.serialization.safe_globals(known):
            yield
    finally:
        FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _read_metadata(reader: FileSystemReader, *_: Any, **options: Any) -> Metadata:
    """Read an index like ``FileSystemReader``, with an unpickler restricted to its classes."""
    rank = options.get("rank")  # rank of a process with an index of its own
    index = Path(reader.path) / f"{'' if rank is None else f'__{rank}'}{_METADATA}"
    with index.open("rb") as handle:
        metadata = _MetadataUnpickler(handle).load()
    _check_entries(index, metadata)
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler restricted to the classes of a sharded checkpoint's index."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := super().find_class(module, name), _DTYPES):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _load(file: Path, trust: bool = False) -> Any:
    known = [] if trust else [_class(*name) for name in _wanted(file)]
    with torch.serialization.safe_globals(known):
        return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=not trust)


def _wanted(file: Path) -> list[tuple[str, str]]:
    """Return the plain classes of DeepSpeed that a file refers to; they require DeepSpeed to be installed."""
    if file.name.endswith(_METADATA) or not zipfile.is_zipfile(file):
        return []
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    return [(module, name) for module, name in _DEEPSPEED_CLASSES if f"{module}.{name}" in named]


def _class(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise InputError(f"this is a checkpoint of DeepSpeed: install it ({first_line(error)})") from error


def _read_sharded(path: Path) -> dict[str, Tensor]:
    prefix = "state_dict."
    reader = FileSystemReader(path)
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _read_deepspeed(path: Path) -> Mapping[str, Tensor]:
    if not _model_states(path):
        raise InputError(f"checkpoint is {str(path)!r}: the folder holds no checkpoint of FSDP2 or DeepSpeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_model_states(path)[0].parent.name)


def _model_states(path: Path) -> list[Path]:
    return sorted(path.glob("*/*model_states.pt"))
