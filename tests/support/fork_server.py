"""A server that forks test processes; it serves all processes of pytest, since its imports take twenty seconds."""

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ADDRESS = "LIT_PRUNE_TEST_SERVER"
"""Environment variable with the path of the server's socket."""
_PRELOADED = ("lit_prune.callbacks", "lit_prune.training", "peft", "deepspeed", "support.preloaded")


class Forked:
    """A process that the server forks, with the interface of ``multiprocessing.Process``."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Keep the function to call, one of a module, and its arguments."""
        self._call = target, args
        self._server: Connection
        self.pid: int
        self.exitcode: int | None = None

    def start(self) -> None:
        """Fork the process; the server's first one waits for its imports."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.environ[ADDRESS])
            self._server = Connection(client.detach())
        self._server.send(self._call)
        self.pid = self._server.recv()

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        self.join(0)
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most ``timeout`` seconds if they are given."""
        if self.exitcode is None and self._server.poll(timeout):
            self.exitcode = self._server.recv()
            self._server.close()

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def running() -> Iterator[None]:
    """Run a server, which imports nothing before it is asked for a process, and tell its address to all processes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ADDRESS] = str(Path(folder) / "socket")
        # Modules are as on a machine without a GPU, and forked processes have none of the server's threads.
        own = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        own["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
        )
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.environ[ADDRESS])
            listener.listen()
            command = [sys.executable, __file__, str(listener.fileno())]
            server = subprocess.Popen(command, env={**os.environ, **own}, pass_fds=[listener.fileno()])
        try:
            yield
        finally:
            server.terminate()
            server.wait()


def _serve(listener: socket.socket) -> None:
    """Fork a supervisor for every connection, until the process that started the server has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the supervisors
    listener.settimeout(1)
    owner, ready = os.getppid(), False
    while os.getppid() == owner:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if not ready:
            for module in _PRELOADED:
                import_module(module)
            gc.freeze()  # so that no process looks through the imported objects, and copies their pages
            ready = True
        if os.fork() == 0:
            listener.close()
            _supervise(Connection(connection.detach()))
            os._exit(0)
        connection.close()


def _supervise(client: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    target, args = client.recv()
    process = get_context("fork").Process(target=target, args=args)
    process.start()
    client.send(process.pid)
    process.join()
    client.send(process.exitcode)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are those of the package support
    _serve(socket.socket(fileno=int(sys.argv[1])))
