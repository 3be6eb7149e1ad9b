"""Checks of the files in a model's folder before a library reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from lit_prune.checkpoint.files import read_json, tensor_names
from lit_prune.errors import InputError, first_line

_OBJECTS = ("config.json", "generation_config.json")
_TOKENIZER_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "tekken.json")
_TOKENIZER_ARGUMENTS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files whose values become arguments of a tokenizer, which opens a value that is a file name."""
_NOT_OPENED = ("name_or_path", "special_tokens_map_file")
"""Values that record an earlier location of a tokenizer, and are never opened."""
SINGLE_FILE = "model.safetensors"
FLOATING = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, as safetensors names them."""
_SIZES = (
    "vocab_size",
    "num_hidden_layers",
    "intermediate_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Values of a config; a model has at least as many weights as each of them times its hidden size."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def check_folder(folder: Path, pretrained: str) -> None:
    """Check that the files of a model are readable, are inside its folder, and have the format of their name.

    Links within the folder are permitted, as are those of the hub's cache, from ``snapshots/x/`` to ``blobs/``.

    Args:
        folder: folder of the model.
        pretrained: name of the model, for errors.

    Raises:
        InputError: if a file is unreadable, damaged or outside the folder, or if the weights belong to an adapter.
    """
    asked = f"model.pretrained is {pretrained!r}"
    if not (folder / "config.json").is_file():
        raise InputError(f"{asked}: the folder has no config.json, so it is not a model")
    check_no_adapter(folder, pretrained)
    for place, folders, names in os.walk(folder, onerror=_cannot_be_read):
        for name in (*folders, *names):
            inside(folder, os.path.relpath(Path(place, name), folder))
    for file in folder.iterdir():
        if file.is_file():
            _check_readable(file)
    _check_objects(folder, _OBJECTS)
    for index in folder.glob("*.index.json"):
        _check_weight_map(folder, index)


def check_no_adapter(folder: Path, pretrained: str) -> None:
    """Raise ``InputError`` if a folder contains an adapter."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"model.pretrained is {pretrained!r}: the folder has an adapter_config.json, so it is an adapter and no "
            "model; merge it into its model first (merge_and_unload in peft)"
        )


def check_tokenizer_files(folder: Path) -> None:
    """Raise ``InputError`` if the tokenizer of a folder is missing or damaged."""
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise InputError(
            f"the tokenizer of {str(folder)!r} cannot be loaded (the folder has none); copy the files of its tokenizer "
            "into the folder"
        )
    _check_objects(folder, _TOKENIZER_OBJECTS)
    for file in _TOKENIZER_ARGUMENTS:
        if (folder / file).is_file():
            _check_arguments(folder, folder / file)
    templates = (
        _read_object(config).get("chat_template") if (config := folder / "tokenizer_config.json").is_file() else 0
    )
    for template in templates if isinstance(templates, list) else ():
        name = template.get("name") if isinstance(template, Mapping) else template
        if not (isinstance(name, str) and name.isidentifier()):
            raise InputError(f"{str(config)!r} has a chat template of the name {name!r}: it must be a plain word")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a model's folder; raise ``InputError`` if a link in the path leads outside it."""
    path = folder / name
    target = path.resolve()
    if not _belongs(target, folder):
        raise InputError(
            f"{str(folder)!r}: {str(target)!r}, to which the link {name!r} leads, is outside of the folder; copy it "
            "into the folder"
        )
    if path.is_symlink() and not target.exists():
        raise InputError(f"{str(folder)!r}: the link {name!r} leads to {str(target)!r}, which is not there")
    return path


def _belongs(target: Path, folder: Path) -> bool:
    """Return whether a resolved path is in a folder or, in the hub's cache, in the folder that its links lead to."""
    root = folder.resolve()
    places = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    return any(target.is_relative_to(place) for place in places)


def check_size(folder: Path, config: Any, weights_per_byte: int = 1) -> None:
    """Raise ``InputError`` if a matrix of a config is larger than all weight files combined.

    Otherwise random weights of that size would be allocated before they are found to be missing from the files.

    Args:
        folder: folder of the model.
        config: config of the model, as read by transformers.
        weights_per_byte: maximum number of weights per byte of a file.
    """
    config = config.get_text_config()
    sizes = {name: value for name in _SIZES if isinstance(value := getattr(config, name, None), int)}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    files = [file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.name != "masks.safetensors"]
    held = sum(file.stat().st_size for file in files) * weights_per_byte
    if held and largest and sizes[largest] * sizes.get("hidden_size", 1) > held:
        raise InputError(
            f"{str(folder / 'config.json')!r} has {largest} {sizes[largest]:,}, for which the weights beside it are "
            f"too few: {held:,} at most"
        )


def _check_objects(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).is_file():
            _read_object(folder / name)


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{str(file)!r} holds a JSON {type(content).__name__}: an object is needed")
    return content


def _check_arguments(folder: Path, file: Path) -> None:
    """Raise ``InputError`` if an argument of a tokenizer is the name of a file outside its folder."""
    content = _read_object(file)
    positional = content.get("init_inputs")
    arguments = [value for name, value in content.items() if name not in _NOT_OPENED]
    for value in [*arguments, *(positional if isinstance(positional, list) else ())]:
        if isinstance(value, str) and (target := _outside(folder, value)):
            raise InputError(
                f"{str(folder)!r}: {str(target)!r}, which {file.name} names, is outside of the folder; copy it into "
                "the folder, or take its name out"
            )


def _outside(folder: Path, name: str) -> Path | None:
    """Return the file of a name, relative to the working directory or to a folder, if it is outside the folder."""
    try:
        targets = [path.resolve() for path in (Path(name), folder / name) if path.is_file()]
    except (OSError, ValueError):  # not a file name
        return None
    return next((target for target in targets if not _belongs(target, folder)), None)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files with the weights of a model: a single one, those of its index, or both."""
    index = folder / f"{SINGLE_FILE}.index.json"
    named = set(_weight_map(index).values()) if index.is_file() else set()
    files = [folder / name for name in sorted({*named, SINGLE_FILE}) if name.endswith(".safetensors")]
    return [file for file in files if file.is_file()]


def stored_dtypes(file: Path) -> dict[str, str]:
    """Return the dtypes of the tensors in a safetensors file by name, such as ``BF16``, without reading them."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(file)!r} cannot be read as safetensors ({first_line(error)})") from error


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{str(index)!r} has no weight_map from the names of weights to those of files")
    return weight_map


def _check_weight_map(folder: Path, index: Path) -> None:
    """Raise ``InputError`` if an index names files outside its folder, or other tensors than its shards contain."""
    weight_map = _weight_map(index)
    for name in sorted(set(weight_map.values())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"{str(folder)!r}: {name!r}, which {index.name} names, is outside of the folder; copy it there"
            )
    shards = {name for name in weight_map.values() if name.endswith(".safetensors")}
    # The loader names a missing file.
    stored = {name: tensor_names(folder / name) for name in sorted(shards) if (folder / name).is_file()}
    for name, shard in sorted(weight_map.items()):
        if name not in stored.get(shard, {name}):
            raise InputError(
                f"{str(folder / shard)!r} lacks {name}, which is there according to {index.name}; the index and its "
                "shards do not belong together"
            )
    for shard, names in stored.items():
        if others := [name for name in sorted(names) if weight_map.get(name) != shard]:
            place = f"places in {weight_map[others[0]]!r}" if others[0] in weight_map else "does not list"
            raise InputError(
                f"{str(folder / shard)!r} holds {others[0]}, which {index.name} {place}; "
                "the index and its shards do not belong together"
            )


def _check_readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        _cannot_be_read(error)


def _cannot_be_read(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename!r} cannot be read ({error.strerror}): ask its owner for permission") from error
