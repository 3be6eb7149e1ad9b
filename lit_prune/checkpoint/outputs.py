"""Checks of the output folder or file of a run: permission, overwriting and disk space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from lit_prune.checkpoint.masks import MASKS_FILE, REPORT_FILE
from lit_prune.errors import DiskError, InputError, first_line

PRUNED, ANALYSIS = "config.json", "analysis.json"
"""File that identifies a folder of each kind."""
_TOKENIZERS = (
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*spm*.model", "spiece.model", "sentencepiece*.model", "chat_template.*", "additional_chat_templates"),
    *("additional_chat_templates/*.jinja", "normalizer.json"),
)
_FILES = {
    PRUNED: (
        *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py"),
        *(*_TOKENIZERS, MASKS_FILE, REPORT_FILE, "report.html", "README.md", "*.png"),
        *("adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    ),
    ANALYSIS: ("analysis.json", "*.png"),
}
"""Shell patterns over the names of all files written to a folder of each kind."""
_LONGEST = 200
"""Maximum length of a folder's name in bytes: file systems allow 255, and temporary names are longer."""


def check_output(folder: str | Path, overwrite: bool, kind: str = PRUNED, reads: Iterable[str | Path] = ()) -> Path:
    """Return the output folder of a run with links resolved, if the run may write it.

    Args:
        folder: output folder.
        overwrite: whether an earlier result of the same kind may be replaced; other content is never replaced.
        kind: kind of folder, ``PRUNED`` or ``ANALYSIS``.
        reads: files and folders that the run reads; names that do not exist locally are ignored.

    Raises:
        InputError: if the folder exists and ``overwrite`` is off, contains other files, equals, contains or is inside
            a file or folder that is read, or cannot be created.
    """
    path = _resolved(folder)
    if path.exists() and not path.is_dir():
        raise _refused(folder, "it is a file; name a folder")
    for read in filter(None, map(_existing, reads)):
        if read == path or path in read.parents:
            raise _refused(folder, f"it is or contains {str(read)!r}, which this run reads; choose another folder")
        if (read / PRUNED).is_file() and read in path.parents:
            raise _refused(folder, f"it lies in {str(read)!r}, which this run reads; choose another folder")
    if path.exists() and not overwrite:
        raise _refused(folder, "it exists and is kept; choose another folder or add --overwrite")
    if path.exists() and any(path.iterdir()):
        if not (path / kind).is_file():
            raise _refused(folder, f"it holds no {kind}, so it is not overwritten")
        if kind == PRUNED and not any((path / name).is_file() for name in (MASKS_FILE, REPORT_FILE)):
            raise _refused(
                folder,
                f"it is a model without {MASKS_FILE} and {REPORT_FILE}, which lit-prune has not written: move it "
                "elsewhere",
            )
        if other := find_other(path, kind):
            raise _refused(folder, f"it holds {other!r}, which lit-prune has not written: move it elsewhere first")
    return path


def check_folder_for(option: str, folder: str | Path) -> None:
    """Raise an ``InputError`` that names the option if a folder cannot be created or written to."""
    try:
        path = Path(folder).expanduser().absolute()
        parent = path if path.exists() else _existing_parent(path)
        possible = bool(str(folder)) and parent.is_dir() and os.access(parent, os.W_OK) and "\0" not in str(path)
    except (OSError, RuntimeError, ValueError):
        possible = False
    if not possible:
        raise InputError(f"{option} is {str(folder)[:_LONGEST]!r}, which is not writable: name another folder")


def check_space(folder: str | Path, model: nn.Module, copies: int = 1, replaced: Path | None = None) -> None:
    """Raise ``DiskError`` if the disk of ``folder`` lacks space for ``copies`` of the model and its masks.

    Args:
        folder: output folder.
        model: model to write.
        copies: number of copies.
        replaced: folder whose files are already part of the copies, such as the journal of a resumed run.
    """
    needed = copies * sum(p.numel() * p.element_size() + p.numel() // 8 for p in model.parameters())
    if replaced is not None and replaced.is_dir():
        needed -= sum(file.stat().st_size for file in replaced.iterdir() if file.is_file())
    free = shutil.disk_usage(_existing_parent(Path(folder).expanduser())).free
    if free < needed:
        raise DiskError(f"output is {str(folder)!r}: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def find_other(folder: Path, kind: str = PRUNED) -> str | None:
    """Return the name of a file in a folder that does not belong to folders of its kind; None if there is none."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not any(
            fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _FILES[kind]
        ):
            return name
    return None


def check_file(output: str | Path, suffix: str, overwrite: bool, reads: Iterable[str | Path] = ()) -> Path:
    """Return the output file of a command with links resolved, if the command may write it.

    Args:
        output: output file.
        suffix: required suffix of the file name, such as ``.json``.
        overwrite: whether an existing file may be replaced.
        reads: files and folders that the command reads; no file in them is replaced.

    Raises:
        InputError: if the file exists and ``overwrite`` is off, is or is inside a file or folder that is read, or
            cannot be written.
    """
    path = _resolved(output)
    if path.suffix != suffix:
        raise _refused(output, f"name a file that ends in {suffix}")
    if path.is_dir():
        raise _refused(output, "it is a folder; name a file")
    for read in filter(None, map(_existing, reads)):
        if read == path or (path.exists() and read in path.parents):
            raise _refused(output, f"it is or lies in {str(read)!r}, which this run reads; choose another file")
    if path.exists() and not overwrite:
        raise _refused(output, "it exists and is kept; choose another file or add --overwrite")
    return path


def _resolved(folder: str | Path) -> Path:
    if not str(folder).strip():
        raise InputError("output is empty: name a folder")
    path = Path(folder).expanduser()
    if "\0" in str(folder) or len(os.fsencode(path.name)) > _LONGEST:
        raise _refused(folder, f"a name may have {_LONGEST} bytes, none of them zero")
    if path.is_symlink() and not path.exists():
        raise _refused(folder, "it is a link to nothing")
    try:
        path = path.resolve()
        parent = path if path == path.parent else _existing_parent(path)
    except (OSError, RuntimeError) as error:
        raise _refused(folder, f"it cannot be made ({first_line(error)})") from error
    if path == path.parent:
        raise _refused(folder, "it is the root of the file system; name a folder in it")
    if not parent.is_dir():
        raise _refused(folder, f"{str(parent)!r} is a file, so nothing can be in it")
    if not os.access(parent, os.W_OK):
        raise _refused(folder, f"{str(parent)!r} cannot be written to")
    return path


def _existing(name: str | Path) -> Path | None:
    """Return a local file or folder with links resolved; None if there is none of that name."""
    try:
        path = Path(name).expanduser().resolve()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # hub names can be any string
        return None


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _refused(folder: str | Path, reason: str) -> InputError:
    return InputError(f"output is {str(folder)[:_LONGEST]!r}: {reason}")
