"""Prune a model once: evaluate, prune, evaluate again, and save."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_prune.callbacks.prune import Request, find_prune
from lit_prune.checkpoint.locks import claimed
from lit_prune.checkpoint.outputs import check_output, check_space
from lit_prune.checkpoint.save import save_pruned
from lit_prune.commands.checks import drop_unwritable_logs
from lit_prune.commands.evaluate import HARNESS, scores_of_tasks
from lit_prune.commands.output import on_device, refuse_lazy, show
from lit_prune.errors import DiskError, InputError
from lit_prune.models.generate import continuations
from lit_prune.ops import Structured, collectives
from lit_prune.options import as_list
from lit_prune.pruning import PruningPlan
from lit_prune.pruning.journal import Journal
from lit_prune.reporting.analysis import spectra_of
from lit_prune.reporting.documents import render
from lit_prune.reporting.report import Sample, Scores
from lit_prune.reporting.tables import blocks_table, summary_table
from lit_prune.sharding.offload import disk_store_of
from lit_prune.signals import Interrupted, stopping_on_signals
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.lm_eval import Harness

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer

PROMPTS = ("The capital of France is", "The most important thing about a good bridge is")
Resume = Literal["auto", "never"]


def prune(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    output: str = "pruned",
    overwrite: bool = False,
    resume: Resume | None = None,
    tasks: Sequence[str] | str = (),
    harness: Harness = HARNESS,
    prompts: Sequence[str] | str = PROMPTS,
) -> None:
    """Prunes a model once, evaluates it before and after, and saves it as a Hugging Face folder.

    Args:
        trainer: Trainer with a Prune callback.
        model: The language model.
        datamodule: Data module with the calibration and test text.
        output: Folder to write.
        overwrite: Replace the folder if it exists.
        resume: Resume an interrupted run from its finished blocks, if there are any (auto), or discard them and
            restart (never); null = raise an error if there are any.
        tasks: Tasks of lm-evaluation-harness to run before and after pruning; empty = only the perplexity.
        harness: Settings of lm-evaluation-harness.
        prompts: Prompts that the model continues before and after pruning, for the report.
    """
    callback = find_prune(trainer)
    _check_trainer(trainer)
    if isinstance(callback.plan.pattern, Structured):
        refuse_lazy(model, "a structured pattern")
    tasks, prompts = as_list(tasks), as_list(prompts)
    _check_prompts(prompts)
    folder = check_output(output, overwrite, reads=_read_by(model, datamodule, callback.plan))
    journal = Journal.beside(folder)
    Journal.check_unfinished(journal, resume)
    if tasks:
        harness.check(tasks)
    batches = datamodule.calibration_batches() if callback.plan.needs_data else []
    datamodule.setup("test")  # raises for an unreadable text before the model is loaded
    with claimed(folder) if trainer.is_global_zero else nullcontext():
        model.configure_model()  # drops the changed blocks of an earlier run in model.lazy
        copies = 3 if model.lazy else 2  # the folder, the journal, changed blocks
        check_space(folder, model.model, copies, replaced=journal if resume == "auto" else None)
        spectra = spectra_of(model.model, callback.plan.find_targets(model.model)[1], callback.plan.allocator)
        tokenizer = model.load_tokenizer()
        prompts = () if model.lazy else prompts  # every token would read the whole model from disk
        evaluated = partial(_evaluated, trainer, model, datamodule, tasks, harness, prompts)

        before = evaluated()
        with _resumable(trainer, journal), on_device(trainer, model):
            report = callback.prune(trainer, model, batches, Request(callback.plan, journal, resume == "auto"))
        masks = report.masks
        if report.kept:
            model.model, masks = report.smaller(model.model), {}
        after = evaluated()

        report.evaluation = {
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "seqlen": datamodule.seqlen,
            "text": datamodule.test_text,
        }
        if tasks:
            report.evaluation["tasks"] = {"before": before.scores, "after": after.scores}
        report.spectra = spectra
        report.samples = [Sample(*sample) for sample in zip(prompts, before.texts, after.texts, strict=True)]
        report.recipes = [trainer.recipe] if trainer.recipe else []
        callback.log_outcome(trainer)
        documents = render(report, title=Path(model.pretrained).name)
        with _resumable(trainer, journal):
            collectives.on_first_rank(lambda: save_pruned(folder, model.model, tokenizer, masks, documents, overwrite))
        if trainer.is_global_zero:
            Journal.remove(journal)
            if disk := disk_store_of(model.model):
                disk.forget()
            show(trainer, [blocks_table(report), summary_table(report)], folder)


@dataclass(frozen=True)
class _Evaluated:
    """Evaluation of a model."""

    perplexity: float
    scores: Scores
    texts: list[str]


def _evaluated(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    tasks: Sequence[str],
    harness: Harness,
    prompts: Sequence[str],
) -> _Evaluated:
    perplexity = trainer.test(model, datamodule=datamodule, verbose=False)[0]["test/perplexity"]
    scores = scores_of_tasks(trainer, model, tasks, harness) if tasks else {}
    with on_device(trainer, model) as whole:
        return _Evaluated(perplexity, scores, continuations(whole, model.load_tokenizer(), prompts))


def _check_trainer(trainer: PruningTrainer) -> None:
    if isinstance(trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
        raise InputError(
            f"trainer.strategy is {type(trainer.strategy).__name__}: to prune once, use ddp, in which every process "
            "holds the model whole, or ddp and model.lazy; or prune in lit-prune fit, with the schedule OneShot"
        )
    if trainer.limit_test_batches == 0:
        raise InputError("trainer.limit_test_batches is 0: prune evaluates before and after, on at least one batch")
    drop_unwritable_logs(trainer)


def _check_prompts(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"prompts hold {prompt!r}: give each some words, or --prompts '[]' for none")


@contextmanager
def _resumable(trainer: PruningTrainer, journal: Path) -> Iterator[None]:
    """Add advice on resuming to the error if a signal or a full disk stops a run with a journal."""
    advice = f"; finished blocks are kept in {str(journal)!r}: go on with the same command and --resume auto"
    try:
        with stopping_on_signals():
            yield
    except DiskError as error:
        raise DiskError(f"{error}{advice}") from error
    except Interrupted as stop:
        if trainer.world_size > 1 and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # processes that would wait for this one forever
        raise Interrupted(stop.number, advice) from None


def _read_by(model: LitCausalLM, datamodule: TextDataModule, plan: PruningPlan) -> list[str]:
    """Return the names of the files, folders and hub repositories that a pruning run reads."""
    files = [getattr(plan.allocator, name, None) for name in ("path", "values")]
    texts = [*datamodule.sources.values(), *datamodule.train, *datamodule.calibration, datamodule.tokenizer]
    return [name for name in (model.pretrained, model.lazy, *texts, *files) if name]
