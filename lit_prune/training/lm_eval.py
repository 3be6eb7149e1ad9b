"""Evaluation of a model in memory on tasks of lm-evaluation-harness."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from traceback import clear_frames
from typing import Any

from torch import OutOfMemoryError, nn
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import InputError, NumericalError, first_line
from lit_prune.internals.lm_eval import without_description
from lit_prune.models.quiet import quiet_hub
from lit_prune.reporting.report import Scores


@dataclass(frozen=True)
class Harness:
    """Settings of lm-evaluation-harness."""

    include_path: str | None = None
    """Folder with custom task files (YAML), which need trust; null = none."""
    trust: bool = False
    """Allow the task files of include_path, which may run code."""
    num_fewshot: int | None = None
    """Number of few-shot examples before each question; null = the task's default."""
    limit: int | None = None
    """Number of questions per task; null = all."""
    batch_size: int = 8
    """Number of sequences per batch."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.include_path is not None and not os.path.isdir(os.path.expanduser(self.include_path)):
            raise InputError(f"harness.include_path is {self.include_path!r}: there is no such folder")
        if self.include_path is not None and not self.trust:
            raise InputError(
                f"harness.include_path is {self.include_path!r}: task files may run code; if you trust their author, "
                "add --harness.trust true"
            )
        for name, value, least in (("num_fewshot", self.num_fewshot, 0), ("limit", self.limit, 1)):
            if value is not None and value < least:
                raise InputError(f"harness.{name} is {value}: it must be {least} or more, or null")
        if self.batch_size < 1:
            raise InputError(f"harness.batch_size is {self.batch_size}: it must be 1 or more")

    def check(self, tasks: Sequence[str]) -> None:
        """Raise ``InputError`` if a task is unknown; needs no model."""
        self._manager(tasks)

    def evaluate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]) -> Scores:
        """Return the scores of a model, by task; the model is not modified.

        Args:
            model: a causal language model of transformers, in memory.
            tokenizer: tokenizer of the model.
            tasks: names of tasks or groups of tasks.

        Raises:
            InputError: if lm-eval is not installed, a task is unknown, cannot be run or has no scores.
        """
        manager = self._manager(tasks)
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet(), without_description():
            language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
            with self._mistakes(tasks):
                found = simple_evaluate(
                    language_model,
                    tasks=list(tasks),
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                )
        assert found is not None  # only nonzero ranks get None, and this is a single process
        scores = {task: _scores(values) for task, values in found["results"].items()}
        for name, values in scores.items():
            if not values and not found["group_subtasks"].get(name):
                raise InputError(
                    f"tasks are {', '.join(tasks)}: {name!r} has no scores; tasks need metrics, and groups need tasks"
                )
        return scores

    def _manager(self, tasks: Sequence[str]) -> Any:
        """Return a task manager that knows all ``tasks``; the harness's own thousands are indexed only if needed."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError("tasks need lm-evaluation-harness: pip install 'lit-prune[eval]'") from error
        if not tasks:
            raise InputError("tasks are empty: name some, such as --tasks '[arc_easy, piqa]'")
        path = None if self.include_path is None else str(Path(self.include_path).expanduser())
        with self._mistakes(tasks):
            if path is not None:
                own = TaskManager(include_path=path, include_defaults=False)
                if not _unknown(own, tasks):
                    return own
            manager = TaskManager(include_path=path)
        for task in _unknown(manager, tasks):
            near = get_close_matches(task, map(str, manager.all_tasks), n=3)  # a file may call a task 3
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them"
            source = "lm-evaluation-harness does not define"
            if path is not None:
                source = f"neither a valid file in harness.include_path {path!r} nor lm-evaluation-harness defines"
            raise InputError(f"tasks name {task!r}, which {source}: {hint}")
        return manager

    @contextmanager
    def _mistakes(self, tasks: Sequence[str]) -> Iterator[None]:
        """Convert an error in a task to an ``InputError``."""
        try:
            yield
        except BaseException as error:
            clear_frames(error.__traceback__)  # closes the harness's progress bar, which ends its line
            if message := self._mistake(error):
                raise InputError(f"tasks are {', '.join(tasks)}: {message}") from error
            raise

    def _mistake(self, error: BaseException) -> str | None:
        """Return a message for an error in a task; None if another part failed, or the command was interrupted."""
        if isinstance(error, (NumericalError, MemoryError, OutOfMemoryError)):
            return None
        if isinstance(error, (ConnectionError, FileNotFoundError)):
            own = "give tasks of your own with harness.include_path" if self.include_path is None else self._remedy()
            return (
                f"their data cannot be loaded ({first_line(error)}); run this once with a network, which fills the "
                f"cache, or {own}"
            )
        users = ValueError if self.include_path is None else (Exception, SystemExit)
        return f"they cannot be run ({_reason(error)}); {self._remedy()}" if isinstance(error, users) else None

    def _remedy(self) -> str:
        """Return the values to check after an error in a task."""
        path = self.include_path
        files = "tasks" if path is None else f"the task files in harness.include_path {path!r}"
        return f"check {files}" if self.num_fewshot is None else f"check {files} and harness.num_fewshot"


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if task not in manager.all_tasks]


def _reason(error: BaseException) -> str:
    """Return the type and message of an error's cause, or of the error itself if it has none.

    >>> _reason(KeyError("question"))
    "KeyError: 'question'"
    """
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {first_line(cause)}" if str(cause).strip() else type(cause).__name__


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores among a task's values, by name.

    >>> _scores({"acc,none": 0.5, "acc_stderr,none": 0.1, "em_stderr,strict": 0.2, "alias": "x"})
    {'acc': 0.5, 'acc_stderr': 0.1, 'em,strict_stderr': 0.2}
    """
    found = {}
    for name, value in values.items():
        metric, comma, kind = name.partition(",")
        if comma and isinstance(value, (int, float)):
            error = "_stderr" if metric.endswith("_stderr") else ""
            of_kind = "" if kind == "none" else f",{kind}"
            found[f"{metric.removesuffix('_stderr')}{of_kind}{error}"] = float(value)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the harness's log messages, except errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_hub():
            yield
    finally:
        logger.setLevel(before)
