"""Functions of lm-evaluation-harness that no argument switches off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

DESCRIBE = ("get_git_commit_hash", "add_env_info")
"""Functions with which ``simple_evaluate`` adds the environment to its results."""


@contextmanager
def without_description() -> Iterator[None]:
    """Leave the environment out of the results of ``simple_evaluate``; lit-prune does not read it.

    Describing it runs ``git`` and ``python -m pip`` in the working directory: the first runs programs that a
    repository's config names and prints an error outside a repository, the second runs a file ``pip.py``.
    """
    evaluator = import_module("lm_eval.evaluator")
    replaced = {name: getattr(evaluator, name) for name in DESCRIBE}
    for name in DESCRIBE:
        setattr(evaluator, name, _nothing)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(evaluator, name, function)


def _nothing(*args: Any) -> None:
    pass
