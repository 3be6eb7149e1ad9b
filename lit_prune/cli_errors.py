"""Turn what the command line's libraries raise for a user's mistake into one line."""

from __future__ import annotations

import re

from jsonargparse import ArgumentError
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from lit_prune.allocators import METHODS as ALLOCATORS
from lit_prune.errors import InputError, NumericalError, first_line
from lit_prune.pruning import Reconstruction
from lit_prune.scorers import METHODS as SCORERS
from lit_prune.solvers import METHODS as SOLVERS

_KNOWN = {
    "plan.scorer": list(SCORERS),
    "plan.solver": list(SOLVERS),
    "plan.allocator": list(ALLOCATORS),
    "plan.reconstruction": [Reconstruction.__name__],
}
_KEY = re.compile(r'(?:- )?Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)')
_CLASS = re.compile(r"(?:- )?Problem with given class_path '(?P<path>[^']+)':\s*(?P<rest>.*)")
_FRAME = re.compile(r"Does not validate against|Subtypes:|Errors:|$")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>.*)")


def explain(error: BaseException) -> str | None:
    """Return one line for a user's mistake, or None for anything else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (InputError, NumericalError)):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ArgumentError):
        return _innermost(str(error))
    return first_line(error) if isinstance(error, MisconfigurationException) else None


def _innermost(message: str) -> str:
    r"""Reduce jsonargparse's tree of attempts to the path of keys and the first reason at its end.

    >>> _innermost('Parser key "data.seqlen":\n  Expected an int. Got value: abc')
    'data.seqlen: Expected an int. Got value: abc'
    """
    path: list[str] = []
    for line in message.splitlines():
        text = line.strip()
        for pattern, group in ((_KEY, "key"), (_CLASS, "path")):
            if match := pattern.match(text):
                path.append(match[group].removeprefix("lit_prune.").removeprefix("callbacks."))
                text = match["rest"]
        if not _FRAME.match(text):
            return ": ".join([*path, _reason(text.removeprefix("- "), path)])
    return first_line(ValueError(message))


def _reason(text: str, path: list[str]) -> str:
    if match := _UNKNOWN_CLASS.match(text):
        known = _KNOWN.get(path[-1], []) if path else []
        choices = f"use {', '.join(known)}, or" if known else "use the name of a known class, or"
        return f"there is no class {match['name']!r}; {choices} a full import path"
    return text
