"""Evaluation of a model in memory on tasks of lm-evaluation-harness."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import InputError, first_line
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
            InputError: if lm-eval is not installed, a task is unknown, or its data cannot be loaded.
        """
        manager = self._manager(tasks)
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet(), without_description():
            try:
                language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
                found = simple_evaluate(
                    language_model,
                    tasks=list(tasks),
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                )
            except (ConnectionError, FileNotFoundError) as error:
                raise InputError(
                    f"tasks are {', '.join(tasks)}: their data cannot be had ({first_line(error)}); run this once with "
                    "a network, which fills the cache, or give tasks of your own with harness.include_path"
                ) from error
        assert found is not None  # only nonzero ranks get None, and this is a single process
        return {task: _scores(values) for task, values in found["results"].items()}

    def _manager(self, tasks: Sequence[str]) -> Any:
        """Return a task manager that knows all ``tasks``; the harness's own thousands are indexed only if needed."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError("tasks need lm-evaluation-harness: pip install 'lit-prune[eval]'") from error
        if not tasks:
            raise InputError("tasks are empty: name some, such as --tasks '[arc_easy, piqa]'")
        path = None if self.include_path is None else str(Path(self.include_path).expanduser())
        if path is not None:
            own = TaskManager(include_path=path, include_defaults=False)
            if not _unknown(own, tasks):
                return own
        manager = TaskManager(include_path=path)
        for task in _unknown(manager, tasks):
            near = get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise InputError(f"tasks name {task!r}, which lm-evaluation-harness does not know: {hint}")
        return manager


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


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
