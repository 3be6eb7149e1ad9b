"""Locks on files. They end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_prune.errors import InputError

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems answer that have no locks."""


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock while the context lasts; nothing waits for a lock.

    Args:
        path: file that stands for the lock; it is there while the lock is held, and after a kill.
        refusal: the message if another run holds it.

    Raises:
        InputError: another run holds the lock.
        OSError: the file cannot be made.
    """
    handle = _acquire(path)
    if handle is None:
        raise InputError(refusal)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: whoever has opened this file sees that it is another one
        _release(handle)


def _acquire(path: Path) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                raise
            warnings.warn(f"{str(path)!r}: no locks here, so two runs at a time are not told apart", stacklevel=2)
            return handle
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # its holder has just removed it


def _release(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have the file open too
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs from an output folder, and from the files beside it, while this one works on it."""
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        refusal = f"output is {str(folder)!r}: another run is writing it; wait for it, or choose another folder"
        with locked(folder.with_name(f".{folder.name}.lock"), refusal):
            yield
    finally:
        for parent in made:
            if any(parent.iterdir()):
                break
            parent.rmdir()
