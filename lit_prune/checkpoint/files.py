"""Atomic writes of files and folders."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lit_prune.errors import DiskError, InputError, first_line


@contextmanager
def replacing_folder(path: Path, find_other: Callable[[Path], str | None] = lambda _: None) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that replaces it on exit; a killed run leaves the old folder or none.

    Args:
        path: folder to write.
        find_other: function that returns the name of a file in the old folder that was not written by this project,
            in which case the old folder is kept; None if there is none.
    """
    path = path.absolute()
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(path)
        temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
        temporary.mkdir()
    try:
        with _explained(path):
            mode = _new_mode(temporary)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
                    _flush(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = path.with_name(f".{path.name}.writing-{os.getpid()}-old")
    try:
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise DiskError(
            f"{str(path)!r} cannot be written: {first_line(error)}; the finished result is in {str(temporary)!r}"
        ) from error
    if old.exists() and (other := find_other(old)):
        kept = path.with_name(f".{path.name}.kept-{os.getpid()}")  # a name that the clean-up does not match
        old.rename(kept)
        warnings.warn(
            f"{str(kept)!r} is the former folder: it holds {other!r}, which was put there meanwhile", stacklevel=3
        )
    else:
        shutil.rmtree(old, ignore_errors=True)


def _clear_up(path: Path) -> None:
    """Remove partial folders of killed runs, and restore folders that they had moved aside; skip running processes."""
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        found = re.fullmatch(re.escape(f".{path.name}.writing-") + r"(\d+)(-old)?", left.name)
        if found is None or _runs(int(found[1])) or left.is_symlink():
            continue
        if found[2] and not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    """Return whether a process is running on this machine."""
    if process == os.getpid():
        return False  # an earlier attempt of this process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _new_mode(folder: Path) -> int:
    """Return the default mode of a new file; safetensors creates files that only the owner can read."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary sibling of ``path``, flush the file, and rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode & 0o777
            write(temporary)
            temporary.chmod(mode)
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{str(path)!r} cannot be written: {first_line(error)}") from error


def _flush(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def as_json(content: Any) -> str:
    """Return plain data as JSON; NaN and infinity, which JSON does not support, become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically; see ``as_json``."""
    write_atomically(path, lambda temporary: temporary.write_text(as_json(content), encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file; raise an ``InputError`` that names the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON ({first_line(error)})") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary))


def save_tensors_in_order(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend only on its content, atomically; for small files.

    safetensors itself writes the metadata in an order that differs between processes.
    """
    content = save(dict(tensors), dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of eight bytes
    ordered = len(header).to_bytes(8, "little") + header + content[8 + length :]
    write_atomically(path, lambda temporary: temporary.write_bytes(ordered))


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a file, without reading them."""
    with _opened(path) as handle:
        return set(handle.keys())


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a file by name, without reading them."""
    with _opened(path) as handle:
        return {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 - not a dict


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name."""
    with _opened(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raise an ``InputError`` that names the file if it has another format."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} cannot be read as safetensors ({first_line(error)})") from error
