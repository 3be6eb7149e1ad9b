"""Results that several tests ask for, worked out once, in whatever process of pytest-xdist the tests run."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class Shared:
    """A folder that all processes of one run of pytest share."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        """Take the folder above those of the processes, if there are several."""
        base = factory.getbasetemp()
        self.folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder ``name``, which ``make`` has filled; the first one that asks for it makes it.

        A folder whose making failed is made again by the next one that asks: every test that needs it fails.
        """
        folder, done = self.folder / name, self.folder / f"{name}.done"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                make(folder)
                done.touch()
        return folder
