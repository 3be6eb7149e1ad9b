"""Fresh processes for tests."""

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from support.fork_server import Forked

_PROCESS: Any = Forked if sys.platform == "linux" else get_context("spawn").Process
_TIMEOUT = 600  # seconds, on a busy machine


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (negative: the signal that killed it) and all that it printed."""

    code: int
    said: str

    @property
    def last_line(self) -> str:
        """Return the last line that it printed."""
        return self.said.strip().rpartition("\n")[2]


class Started:
    """A process that calls a function; its exit status is the one that the function returns."""

    def __init__(
        self, log: Path, target: Callable[[], int | None], folder: Path | None = None, **environment: str
    ) -> None:
        """Start it.

        Args:
            log: file that gets all that it prints.
            target: a function of a module, or a ``functools.partial`` of one.
            folder: its working directory; this process's by default.
            environment: variables beside those of this process.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        place = str(folder or Path.cwd())
        self._process = _PROCESS(target=_work, args=(target, str(log), place, {**os.environ, **environment}))
        self._process.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return bool(self._process.is_alive())

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def wait(self) -> Ended:
        """Wait until it has ended; one that does not is killed."""
        self._process.join(_TIMEOUT)
        if self.running:
            self._process.kill()
            self._process.join()
        return Ended(self._process.exitcode, self.log.read_text(errors="replace"))


def run(log: Path, target: Callable[[], int | None], folder: Path | None = None) -> Ended:
    """Call a function in a fresh process and wait for its end."""
    return Started(log, target, folder).wait()


def run_ranks(log: Path, target: Callable[[], int | None], ranks: int, folder: Path | None = None) -> list[Ended]:
    """Call a function in each process of a group, as torchrun starts them.

    Args:
        log: file; that of process r is ``log`` with the suffix ``.r``.
        target: as for ``Started``.
        ranks: number of processes; a single one is told of no group.
        folder: as for ``Started``.
    """
    if ranks == 1:
        return [run(log.with_suffix(".0"), target, folder)]
    group = free_group(ranks)
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [Started(log.with_suffix(f".{rank}"), target, folder, **group, **own[rank]) for rank in range(ranks)]
    return [process.wait() for process in started]


def free_group(ranks: int) -> dict[str, str]:
    """Return the environment of the processes of a new group, all but their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def call_with_child(target: Callable[[], int]) -> int:
    """Call a function here and in a child, as Lightning starts the second process of a group.

    The child leaves the function's result in a file ``child``.
    """
    child = os.fork() == 0
    os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK"), "1" if child else "0"))
    result = target()
    if child:
        Path("child").write_text(str(result))
        os._exit(0)
    return result


def on_a_full_disk(target: Callable[[], int | None], limit: int) -> int | None:
    """Call a function while no file can become larger than ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return target()


def _work(target: Callable[[], int | None], log: str, folder: str, environment: Mapping[str, str]) -> None:
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)  # as "python -m" has it
    if deepspeed := sys.modules.get("deepspeed"):
        # It would compile, for a minute, what only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.exit(target())
