"""File locks, which are released when the process that holds them ends for any reason."""

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
"""Error numbers of file systems that do not support locks."""


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock within the context; never waits for a lock.

    Args:
        path: lock file, which exists while the lock is held, and remains after a kill.
        refusal: error message if another run holds the lock.

    Raises:
        InputError: if another run holds the lock.
        OSError: if the file cannot be created.
    """
    handle = _acquire(path)
    if handle is None:
        raise InputError(refusal)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before unlocking, so that others see that it was replaced
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
        os.close(handle)  # the previous holder has just removed it


def _release(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may also have the file open
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock an output folder and its temporary siblings against other runs within the context."""
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
