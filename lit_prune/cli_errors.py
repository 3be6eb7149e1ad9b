"""One-line messages for the errors that libraries raise for a user's mistake."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from jsonargparse import ArgumentError
from lightning.pytorch import callbacks, loggers, strategies
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from torch import optim
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import lit_prune.callbacks
import lit_prune.training
from lit_prune.allocators import METHODS as ALLOCATORS
from lit_prune.errors import DiskError, InputError, NumericalError, first_line
from lit_prune.pruning import Quantize, Reconstruction
from lit_prune.scorers import METHODS as SCORERS
from lit_prune.solvers import METHODS as SOLVERS

_KNOWN = {
    "plan.scorer": list(SCORERS),
    "plan.solver": list(SOLVERS),
    "plan.allocator": list(ALLOCATORS),
    "plan.reconstruction": [Reconstruction.__name__],
    "plan.quantize": [Quantize.__name__],
}
PEER_GONE = "another process ended; its error is above"
"""Message of a process that waited in vain for another one."""
_PEER_GONE = re.compile(r"(gloo|pair\.cc|NCCL|ProcessGroup).*(closed by peer|reset by peer|Broken pipe)", re.DOTALL)
"""Regular expression of the errors of a collective operation in which another process is missing."""
_LONGEST = 600
"""Maximum number of characters of a message."""
_KEY = re.compile(r'(?:- )?Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)')
_CLASS = re.compile(r"(?:- )?Problem with given class_path '(?P<path>[^']+)':\s*(?P<rest>.*)")
_FRAME = re.compile(
    r"(?:- )?(?:Does not validate against|Subtypes:|Errors:|Given value|Subclass types expect"
    r"|a class path \(str\)|a dict with)|$"
)
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>.*)")
_LITERALS = re.compile(r"typing\.Literal\[([^\]]*)\]")
_UNLIKELY = ("Expected a path but", "Expected a <class 'NoneType'>", "Expected a <class 'list'>")
"""Reasons from branches of a union type for which a value was probably not intended."""


class ArgumentsError(Exception):
    """An error raised while parsing arguments, or while building model, data and trainer from them."""


_MISTAKE, _UNEXPECTED = 2, 1
"""Exit statuses for a user's mistake and for other errors."""


def explain(error: BaseException) -> tuple[str, int]:
    """Return a one-line message and the exit status for a fatal error: 2 for a user's mistake, 1 for others."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (InputError, NumericalError)):
            return one_line(cause), _MISTAKE
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (ArgumentsError, ArgumentError)):
        return _innermost(str(error)), _MISTAKE
    if isinstance(error, ProcessRaisedException):
        return _of_child(str(error))
    if isinstance(error, ProcessExitedException):
        return _of_killed_child(error), _MISTAKE
    if refusal := _refusal_of_library(error):
        return refusal, _MISTAKE
    return (
        f"unexpected {type(error).__name__} ({one_line(error)}); --debug shows the traceback; please report it",
        _UNEXPECTED,
    )


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened if it is long."""
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def printable(message: str) -> str:
    """Escape control characters, which a file's names of tensors may hold and a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def _refusal_of_library(error: BaseException) -> str | None:
    """Return one line if a library rejected a value, else None; Lightning checks most settings only at run time."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    if isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)):
        return PEER_GONE
    if raised_in.startswith("torch.optim"):
        option = "lr_scheduler" if raised_in == "torch.optim.lr_scheduler" else "optimizer"
        return f"model.{option} cannot be used ({one_line(error)})"
    by_lightning = isinstance(error, (ValueError, TypeError, OSError, RuntimeError)) and raised_in.startswith(
        ("lightning.", "lightning_")
    )
    return one_line(error) if by_lightning or isinstance(error, MisconfigurationException) else None


def _of_child(report: str) -> tuple[str, int]:
    """Explain the error of another process, which is available only as the text of its traceback."""
    last = report.strip().splitlines()[-1]
    name, _, message = last.partition(": ")
    known = name.rpartition(".")[2] in (InputError.__name__, DiskError.__name__, NumericalError.__name__)
    if known:
        return message, _MISTAKE
    return f"unexpected error in another process ({last}); --debug shows the traceback", _UNEXPECTED


def _of_killed_child(error: ProcessExitedException) -> str:
    if error.signal_name is None:
        return f"process {error.error_index} ended with status {error.exit_code}; its error is above"
    ended = f"process {error.error_index} was ended by {error.signal_name}"
    if error.signal_name == "SIGKILL":
        return f"{ended}, usually because memory ran out: lower --trainer.devices, or the size of the batches"
    return f"{ended}; --trainer.devices 1 may show the error"


def _innermost(message: str) -> str:
    r"""Reduce jsonargparse's tree of attempts to the path of keys and the reason of the most likely attempt.

    The most likely attempt is the one that got furthest into the value; among equals, the first likely one.

    >>> _innermost('Parser key "data.seqlen":\n  Expected an int. Got value: abc')
    'data.seqlen: Expected an int. Got value: abc'
    >>> _innermost('Parser key "x":\n  - Expected a path but [a]\n  - Problem with given class_path \'a\':\n    No b')
    'x: a: No b'
    """
    path: list[tuple[int, str]] = []
    found: list[tuple[tuple[str, ...], str]] = []
    for line in message.splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text.startswith("- "):
            path = [(place, key) for place, key in path if place < indent]
        for pattern, group in ((_KEY, "key"), (_CLASS, "path")):
            if match := pattern.match(text):
                key, text = match[group].removeprefix("lit_prune.").removeprefix("callbacks."), match["rest"]
                if key not in dict(path[-1:]).values():  # jsonargparse may repeat a key
                    path.append((indent, key))
        if not _FRAME.match(text):
            found.append((tuple(key for _, key in path), text.removeprefix("- ")))
    if not found:
        return first_line(ValueError(message))
    if not found[0][0]:
        return found[0][1]
    keys, text = min(found, key=_likelihood)
    return ": ".join([*keys, _reason(text, keys, message)])


def _likelihood(attempt: tuple[tuple[str, ...], str]) -> tuple[int, bool]:
    """Return a sort key that is smallest for the branch of a union for which the value was most likely intended."""
    keys, text = attempt
    return -len(keys), text.startswith(_UNLIKELY)


def _reason(text: str, path: Sequence[str], message: str) -> str:
    if match := _UNKNOWN_CLASS.match(text):
        known = _KNOWN.get(path[-1], [])
        choices = f"use {', '.join(known)}, or" if known else "use the name of a known class, or"
        near = "" if known else did_you_mean(match["name"], _classes())
        return f"there is no class {match['name']!r}; {choices} a full import path{near}"
    choices = ", ".join(_LITERALS.findall(message))
    if choices and "Subtypes:" in message and text.startswith("Expected a <class") and "Got value" not in text:
        return f"give one of {choices}"
    return text


def _classes() -> set[str]:
    """Return the names of the classes that options other than a plan's take."""
    modules = (lit_prune.callbacks, lit_prune.training, callbacks, loggers, strategies, optim, optim.lr_scheduler)
    return {name for module in modules for name in dir(module) if isinstance(getattr(module, name), type)}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is closest to an unknown one; empty if none is close."""
    near = get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
