"""Signals that stop a run, raised as an exception so that the interrupted code can add advice on resuming."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Raised on SIGTERM or Ctrl-C."""

    def __init__(self, number: int, advice: str = "") -> None:
        """Store the number of the signal and the advice to print."""
        super().__init__(f"stopped by {signal.Signals(number).name}{advice}")
        self.number = number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise ``Interrupted`` on SIGTERM and Ctrl-C; a no-op outside the main thread, which receives no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
