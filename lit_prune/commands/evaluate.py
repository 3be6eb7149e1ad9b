"""Evaluate a model on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from lit_prune.checkpoint.files import write_json
from lit_prune.checkpoint.outputs import check_file
from lit_prune.commands.output import on_device
from lit_prune.options import as_list
from lit_prune.reporting.report import Scores
from lit_prune.reporting.tables import scores_table
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.lm_eval import Harness

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer

HARNESS = Harness()
"""Default settings of lm-evaluation-harness."""


def evaluate(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    tasks: Sequence[str] | str,
    harness: Harness = HARNESS,
    output: str | None = None,
    overwrite: bool = False,
) -> Scores:
    """Runs lm-evaluation-harness tasks on a model; validate and test measure its perplexity.

    Args:
        trainer: Trainer whose device is used.
        model: The language model.
        datamodule: Not used.
        tasks: Names of tasks or groups of tasks, such as [arc_easy, piqa].
        harness: Settings of lm-evaluation-harness.
        output: JSON file to write the scores to; null = none.
        overwrite: Replace the file if it exists.
    """
    file = None if output is None else check_file(output, ".json", overwrite, [model.pretrained])
    tasks = as_list(tasks)
    harness.check(tasks)
    model.configure_model()
    scores = scores_of_tasks(trainer, model, tasks, harness)
    Console(quiet=trainer.quiet).print(scores_table({"score": scores}))
    if file is not None:
        write_json(file, scores)
    return scores


def scores_of_tasks(trainer: PruningTrainer, model: LitCausalLM, tasks: Sequence[str], harness: Harness) -> Scores:
    """Return the scores of each task, by task name."""
    with on_device(trainer, model) as whole:
        return harness.evaluate(whole, model.load_tokenizer(), tasks)
