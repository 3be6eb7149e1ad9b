"""Progress of a run: stages, seconds and memory, and the bar or lines that show them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Position:
    """Current position of a pruning run."""

    block: int
    """Index of the current block."""
    blocks: int
    """Number of blocks."""
    stage: str
    """Current stage: ``record``, ``measure``, ``observe``, ``gradients``, ``calibrate``, ``solve``, ``reconstruct`` or
    ``propagate``."""
    seconds_left: float | None
    """Estimated seconds remaining, from the blocks finished so far; None before the first is finished."""


OnProgress = Callable[[Position], None]


class Stages:
    """Times the stages of a run and reports its position to listeners."""

    def __init__(self, blocks: int, listeners: Sequence[OnProgress] = ()) -> None:
        """Start timing a run over ``blocks`` blocks."""
        self.seconds: dict[str, float] = {}
        """Seconds spent in each stage, by stage name."""
        self._blocks = blocks
        self._listeners = listeners
        self._first_block: float | None = None

    @contextmanager
    def stage(self, name: str, block: int = 0) -> Iterator[None]:
        """Announce a stage of a block to the listeners, and add its duration to ``seconds``."""
        start = time.perf_counter()
        if name not in ("record", "measure", "observe", "gradients") and self._first_block is None:
            self._first_block = start
        left = (start - self._first_block) / block * (self._blocks - block) if block and self._first_block else None
        for listener in self._listeners:
            listener(Position(block, self._blocks, name, left))
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def progress(shown: bool = True) -> AbstractContextManager[OnProgress]:
    """Show the progress of a run: as a bar on a terminal, as lines elsewhere.

    >>> with progress() as show:  # doctest: +SKIP
    ...     prune(model, batches, plan, on_progress=show)

    Args:
        shown: whether to show anything.
    """
    return ProgressBar(shown) if Console().is_terminal or not shown else ProgressLines()


class ProgressLines:
    """Prints a line for every finished block: the seconds of its stages, the rate and the time left."""

    def __init__(self) -> None:
        """Initialize; timing starts with the first stage."""
        self._last: Position | None = None
        self._since = 0.0
        self._spent: dict[str, float] = {}

    def __enter__(self) -> OnProgress:
        """Return the listener to call at every stage."""
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Print the last line."""
        self._end_stage()
        if error is None:
            self._end_block()

    def _show(self, position: Position) -> None:
        self._end_stage()
        if self._last is not None and self._last.block != position.block:
            self._end_block()
        self._last = position

    def _end_stage(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._spent[self._last.stage] = self._spent.get(self._last.stage, 0.0) + now - self._since
        self._since = now

    def _end_block(self) -> None:
        if self._last is None:
            return
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._spent.items())
        rate = 60 / max(sum(self._spent.values()), 1e-3)
        left = "" if self._last.seconds_left is None else f"; {_clock(self._last.seconds_left)} left"
        line = f"block {self._last.block + 1}/{self._last.blocks}: {stages}; {rate:.1f} blocks a minute{left}"
        print(line, flush=True)
        self._spent = {}


class ProgressBar:
    """A terminal progress bar: block i of n, the stage and the time left."""

    def __init__(self, shown: bool = True) -> None:
        """Create the bar; entering the context displays it if ``shown``."""
        columns = (
            TextColumn("pruning"),
            BarColumn(bar_width=24),
            TextColumn("block {task.fields[block]}/{task.total} {task.fields[stage]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = Progress(*columns, disable=not shown)
        self._shown = shown
        self._task: TaskID | None = None

    def __enter__(self) -> OnProgress:
        """Show the bar and return the listener that advances it."""
        self._progress.start()
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar at its current position, or at 100 % if the run finished."""
        if self._task is not None and error is None:
            total = self._progress.tasks[0].total
            self._progress.update(self._task, completed=total, stage="done", left="")
        if self._shown:  # some versions of rich print an empty line on stopping a hidden bar
            self._progress.stop()

    def _show(self, position: Position) -> None:
        left = "" if position.seconds_left is None else f"{_clock(position.seconds_left)} left"
        state: dict[str, Any] = {"block": position.block + 1, "stage": position.stage, "left": left}
        if self._task is None:
            self._task = self._progress.add_task("", total=position.blocks, **state)
        self._progress.update(self._task, completed=position.block, **state)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def peak_memory() -> int | None:
    """Return this process's peak GPU memory if it uses a GPU, else its peak main memory, in bytes; None if unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")  # getrusage's peak starts from the parent process's
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
