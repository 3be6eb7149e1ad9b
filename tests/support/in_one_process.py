"""Tests that change a process for good, such as by another device, run together in one of their own."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support import processes


def run(folder: Path, root: Path, prepare: Callable[[], object], tests: Sequence[str]) -> None:
    """Run tests in a fresh process, which leaves what became of them in ``folder``.

    Args:
        folder: for the process's files.
        root: folder that the names of the tests belong to.
        prepare: a function of a module, which changes the process before it imports a test.
        tests: names, as pytest has them.
    """
    ended = processes.run(folder / "log", partial(_run_here, folder, prepare, tests), root)
    (folder / "end").write_text(f"the tests' process ended with {ended.code}:\n{ended.said}")


def failure(folder: Path, test: str) -> str | None:
    """Return how a test failed in that process; None if it passed."""
    outcomes = folder / "outcomes"
    found = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    mine = [text for name, text in found if name == test]
    if not mine:
        return (folder / "end").read_text()  # it died before
    return "\n".join(mine).strip() or None


def _run_here(folder: Path, prepare: Callable[[], object], tests: Sequence[str]) -> int:
    prepare()
    options = ["--quiet", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder / 'temporary'}"]
    return int(pytest.main([*tests, *options], plugins=[_Outcomes(folder / "outcomes")]))


class _Outcomes:
    """A plug-in of pytest that writes down failures, each at once, as the process may die."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            with self._file.open("a") as file:
                file.write(json.dumps([report.nodeid, report.longreprtext if report.failed else ""]) + "\n")
