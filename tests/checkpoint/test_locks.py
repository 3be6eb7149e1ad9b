"""A lock keeps a second run away, and ends with its process."""

import os
import signal
from pathlib import Path

import pytest

from lit_prune.checkpoint.locks import locked
from lit_prune.errors import InputError


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "taken"), pytest.raises(InputError, match="taken"), locked(path, "taken"):
        pass
    assert not path.exists()
    with locked(path, "taken"):
        assert path.exists()


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path / "lock", "taken"):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(InputError, match="taken"), locked(tmp_path / "lock", "taken"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", "taken"):
        pass
    assert not (tmp_path / "lock").exists()
