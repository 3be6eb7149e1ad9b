"""A Trainer with more stages: prune, analyze, evaluate, speed and export."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from lit_prune.allocators import AlphaPruning
from lit_prune.callbacks import Prune
from lit_prune.callbacks.combinations import check_averages, check_callbacks
from lit_prune.callbacks.prune import find_prune
from lit_prune.errors import DiskError, InputError, first_line
from lit_prune.interruption import Interrupted, stopping_on_signals
from lit_prune.models.checkpoints import by_layer, check_trusted, read_checkpoint
from lit_prune.models.files import as_json, write_json
from lit_prune.models.generate import continuations
from lit_prune.models.io import Format, check_shard_size, load_masks, save_documents, save_pruned
from lit_prune.models.lazy import disk_of
from lit_prune.models.locks import locked
from lit_prune.models.outputs import ANALYSIS, check_folder_for, check_output, check_space
from lit_prune.models.peft_format import adapter_files, without_adapters
from lit_prune.models.sparse import Speed, measure_speed
from lit_prune.ops import Unstructured, processes
from lit_prune.ops.masks import check_sparsity
from lit_prune.options import as_list
from lit_prune.pruning import PruningPlan, PruningReport
from lit_prune.pruning.analysis import analyze, spectra_of
from lit_prune.pruning.documents import read_report, render
from lit_prune.pruning.figures import analysis_figures, as_png
from lit_prune.pruning.journal import Journal
from lit_prune.pruning.report import Recipe, Sample, Scores, scores_table, speed_table
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.strategies import FSDP2, DeepSpeed
from lit_prune.training.tasks import Harness

PROMPTS = ("The capital of France is", "The most important thing about a good bridge is")
Resume = Literal["auto", "never"]
_MOST_ROWS = 1_000_000
_NOT_ZERO = ("val_check_interval", "limit_train_batches")
HARNESS = Harness()
"""How tasks are run unless told otherwise."""


class PruningTrainer(Trainer):
    """Lightning's Trainer that can also prune, analyze and export, and that runs no code out of a checkpoint."""

    recipe: Recipe | None = None
    """How it was started, where the command line did."""
    quiet: bool = False
    """Whether it shows no progress and no tables."""

    def __init__(self, **kwargs: Any) -> None:
        """Refuse callbacks that cannot work together, and do as the parent does."""
        callbacks = kwargs.get("callbacks") or []
        check_callbacks([callbacks] if isinstance(callbacks, Callback) else callbacks)
        super().__init__(**kwargs)
        check_averages(self)

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        trust: bool = False,
    ) -> None:
        """Trains a model, pruning it where the schedule of a Prune callback says so.

        Args:
            model: The language model.
            train_dataloaders: What to train on, without a data module.
            val_dataloaders: What to validate on, without a data module.
            datamodule: Its text.
            ckpt_path: Checkpoint to go on from: a file, or the folder of a sharded one.
            trust: Load the checkpoint even where it holds more than tensors and plain data, which may run code.
        """
        self._check_settings()
        self._check_folders()
        weights_only = self._check_checkpoint(ckpt_path, trust)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def validate(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        trust: bool = False,
    ) -> Any:
        """Evaluates a model on the validation text.

        Args:
            model: The language model.
            dataloaders: What to evaluate on, without a data module.
            ckpt_path: Checkpoint to take the weights from: a file, or the folder of a sharded one.
            verbose: Print the result.
            datamodule: Its text.
            trust: Load the checkpoint even where it holds more than tensors and plain data, which may run code.
        """
        weights_only = self._check_checkpoint(ckpt_path, trust)
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        trust: bool = False,
    ) -> Any:
        """Evaluates a model on the test text.

        Args:
            model: The language model.
            dataloaders: What to evaluate on, without a data module.
            ckpt_path: Checkpoint to take the weights from: a file, or the folder of a sharded one.
            verbose: Print the result.
            datamodule: Its text.
            trust: Load the checkpoint even where it holds more than tensors and plain data, which may run code.
        """
        weights_only = self._check_checkpoint(ckpt_path, trust)
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def export(
        self,
        model: LitCausalLM,
        datamodule: TextDataModule,
        checkpoint: str | None = None,
        output: str = "exported",
        to: Format = "hf",
        shard_size: str = "1GB",
        overwrite: bool = False,
        trust: bool = False,
    ) -> None:
        """Turns a training checkpoint, sharded or not, or a pruned folder into a folder to hand on; masks are verified.

        Args:
            model: The language model that was trained, for architecture, dtype and tokenizer; or a pruned folder.
            datamodule: Not read.
            checkpoint: File, or the folder of a sharded checkpoint (FSDP2, DeepSpeed); null = the model as it lies in
                its folder.
            output: Folder to write.
            to: As transformers saves it (hf), in files of a bounded size (hf-sharded), or kept weights and one bit for
                each weight (bitmask: smaller, to the same bits; lit_prune.load_model reads it).
            shard_size: Largest file, for hf-sharded.
            overwrite: Replace the folder where it exists.
            trust: Load the checkpoint even where it holds more than tensors and plain data, which may run code.
        """
        _refuse_lazy(model, "export")
        check_shard_size(shard_size)
        check_output(output, overwrite, reads=[model.pretrained, *([checkpoint] if checkpoint else [])])
        read = None if checkpoint is None else read_checkpoint(checkpoint, trust)
        masks = read.masks if read else load_masks(model.pretrained)
        if read:
            kept = read.callbacks.get("Prune", {}).get("report")
            report = PruningReport.from_dict(kept, by_layer(masks), f"the report in {checkpoint!r}") if kept else None
        else:
            report = read_report(model.pretrained, masks)
        model.configure_model()
        if read:
            try:
                model.model.load_state_dict(read.weights)
            except RuntimeError as error:
                raise InputError(
                    f"checkpoint is {checkpoint!r}: it is not of the model {model.pretrained!r} ({first_line(error)})"
                ) from error
        with without_adapters(model.model) as trained:
            adapters = trained if read else adapter_files(model.pretrained)
            title = Path(model.pretrained).name
            documents = adapters | (render(report, title, to, adapters=bool(adapters)) if report else {})
            tokenizer = model.load_tokenizer()
            folder = save_pruned(output, model.model, tokenizer, masks, documents, overwrite, to, shard_size)
        self._show([], folder)

    def _check_settings(self) -> None:
        """Refuse settings of a training that Lightning takes and stumbles over later, or obeys in silence."""
        least = {
            "accumulate_grad_batches": 1,
            "check_val_every_n_epoch": 1,
            "val_check_interval": 0.0,
            "log_every_n_steps": 0,
            "gradient_clip_val": 0,
            "num_sanity_val_steps": -1,
            "limit_train_batches": 0,
            "min_steps": 0,
            "min_epochs": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and (value < lowest or (value == 0 and name in _NOT_ZERO)):
                raise InputError(f"trainer.{name} is {value}: it must be {'above 0' if name in _NOT_ZERO else lowest}")

    def _check_folders(self) -> None:
        """Refuse folders for logs and checkpoints that cannot be made."""
        folders = {logger.save_dir for logger in self.loggers}
        folders |= {self.default_root_dir} if self.checkpoint_callbacks else set()
        for folder in folders:
            if folder and "://" not in str(folder):
                check_folder_for("trainer.default_root_dir or a logger's folder", folder)

    def _drop_unwritable_logs(self) -> None:
        """Go on without loggers whose folder cannot be written: a pruning does not need them."""
        for logger in self.loggers:
            folder = logger.save_dir
            try:
                Path(folder or ".").mkdir(parents=True, exist_ok=True)
                writable = os.access(folder or ".", os.W_OK)
            except (OSError, ValueError):
                writable = False
            if not writable:
                rank_zero_warn(f"trainer.default_root_dir is {folder!r}, which cannot be written: nothing is logged")
                self.loggers = []
                return

    def _check_checkpoint(self, ckpt_path: str | Path | None, trust: bool) -> bool | None:
        """Refuse a checkpoint that would run code; return Lightning's ``weights_only``."""
        if isinstance(self.strategy, (DeepSpeed, FSDP2)):
            self.strategy.trusted = trust
        if ckpt_path is None:
            return None
        if Path(ckpt_path).expanduser().exists():
            check_trusted(ckpt_path, trust)
        elif not (trust or isinstance(self.strategy, (DeepSpeed, FSDP2))) and isinstance(
            self.strategy, (DeepSpeedStrategy, ModelParallelStrategy)
        ):  # which do not look through what they load
            raise InputError(f"ckpt_path is {str(ckpt_path)!r}: give the folder of the checkpoint, or add --trust")
        return not trust

    def prune(
        self,
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
            model: The language model.
            datamodule: Its calibration and test text.
            output: Folder to write.
            overwrite: Replace the folder where it exists.
            resume: Go on with a run that was stopped, from its finished blocks, if there are any (auto), or begin anew
                without them (never); null = refuse to begin if there are any.
            tasks: Tasks of lm-evaluation-harness, to be run before and after; none = the perplexity alone.
            harness: How they are run.
            prompts: Beginnings that the model goes on from, before and after, for the report.
        """
        if isinstance(self.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
            raise InputError(
                f"trainer.strategy is {type(self.strategy).__name__}: to prune once, use ddp, where every process "
                "holds the model whole, or ddp and model.lazy; or prune in lit-prune fit, with the schedule OneShot"
            )
        if self.limit_test_batches == 0:
            raise InputError("trainer.limit_test_batches is 0: prune evaluates before and after, on at least one batch")
        self._drop_unwritable_logs()
        callback = find_prune(self)
        tasks, prompts = as_list(tasks), as_list(prompts)
        for prompt in prompts:
            if not prompt.strip():
                raise InputError(f"prompts hold {prompt!r}: give each some words, or --prompts '[]' for none")
        folder = check_output(output, overwrite, reads=_read_by(model, datamodule, callback.plan))
        journal = folder.with_name(f".{folder.name}.journal")
        if resume is None and (blocks := Journal.blocks(journal)):
            raise InputError(
                f"output is {output!r}: {str(journal)!r} has {blocks} finished blocks of a stopped run; go on from "
                "them with --resume auto, or begin anew with --resume never"
            )
        if tasks:
            harness.check(tasks)
        if callback.plan.needs_data:
            datamodule.calibration_batches()  # kept for the pruning itself
        datamodule.setup("test")  # texts that cannot be read are found out before the model is loaded
        model.configure_model()
        with self._claimed(folder):
            copies = 3 if model.lazy else 2  # the folder, the journal, changed blocks
            check_space(folder, model.model, copies, replaced=journal if resume == "auto" else None)
            targets = callback.plan.find_targets(model.model)[1]
            tokenizer = model.load_tokenizer()
            prompts = () if model.lazy else prompts  # which would read the whole model for every token
            before = self.test(model, datamodule=datamodule, verbose=False)[0]
            scores = [self._scores(model, tasks, harness)] if tasks else []
            texts = [self._continuations(model, prompts)]
            spectra = spectra_of(model.model, targets, callback.plan.allocator)
            with self._resumable(journal), callback.at_next_test(journal, resume == "auto"):
                after = self.test(model, datamodule=datamodule, verbose=False)[0]
            scores += [self._scores(model, tasks, harness)] if tasks else []
            texts.append(self._continuations(model, prompts))
            report = callback.report
            assert report is not None
            report.evaluation = {
                "perplexity_before": before["test/perplexity"],
                "perplexity_after": after["test/perplexity"],
                "seqlen": datamodule.seqlen,
                "text": datamodule.test_text,
            }
            if scores:
                report.evaluation["tasks"] = {"before": scores[0], "after": scores[1]}
            report.spectra = spectra
            report.samples = [Sample(*sample) for sample in zip(prompts, *texts, strict=True)]
            report.recipes = [self.recipe] if self.recipe else []
            documents = render(report, title=Path(model.pretrained).name)
            with self._resumable(journal):
                processes.from_first(
                    lambda: save_pruned(folder, model.model, tokenizer, report.masks, documents, overwrite)
                )
            if self.is_global_zero:
                Journal.remove(journal)
                if disk := disk_of(model.model):
                    disk.forget()
                self._show([report.table(), report.summary_table()], folder)

    @contextmanager
    def _claimed(self, folder: Path) -> Iterator[None]:
        """Keep other runs from an output, and from the journal beside it, while this one works on it."""
        if not self.is_global_zero:
            yield
            return
        made = not folder.parent.exists()
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            refusal = f"output is {str(folder)!r}: another run is writing it; wait for it, or choose another folder"
            with locked(folder.with_name(f".{folder.name}.lock"), refusal):
                yield
        finally:
            if made and not any(folder.parent.iterdir()):
                folder.parent.rmdir()

    @contextmanager
    def _resumable(self, journal: Path) -> Iterator[None]:
        """Say how to go on where a signal or the disk stops a run that has a journal."""
        advice = f"; finished blocks are kept in {str(journal)!r}: go on with the same command and --resume auto"
        try:
            with stopping_on_signals():
                yield
        except DiskError as error:
            raise DiskError(f"{error}{advice}") from error
        except Interrupted as stop:
            if self.world_size > 1 and self.strategy.launcher is not None:
                self.strategy.launcher.kill(signal.SIGKILL)  # processes that wait for this one
            raise Interrupted(stop.number, advice) from None

    def evaluate(
        self,
        model: LitCausalLM,
        datamodule: TextDataModule,
        tasks: Sequence[str] | str,
        harness: Harness = HARNESS,
        output: str | None = None,
    ) -> Scores:
        """Runs tasks of lm-evaluation-harness on a model; for its perplexity, see validate and test.

        Args:
            model: The language model.
            datamodule: Not read.
            tasks: Names of tasks or groups of tasks, such as [arc_easy, piqa].
            harness: How they are run.
            output: JSON file to write the scores to; null = none.
        """
        tasks = as_list(tasks)
        harness.check(tasks)
        model.configure_model()
        scores = self._scores(model, tasks, harness)
        Console(quiet=self.quiet).print(scores_table({"score": scores}))
        if output is not None:
            write_json(Path(output).expanduser(), scores)
        return scores

    def speed(
        self,
        model: LitCausalLM,
        datamodule: TextDataModule,
        tokens: Sequence[int] | int = (1, 16, 256),
        output: str | None = None,
    ) -> list[Speed]:
        """Times one layer of each shape, with its zeros multiplied and in a sparse form of torch, on this machine.

        Args:
            model: A pruned folder, in the dtype that it will run in.
            datamodule: Not read.
            tokens: Rows of the input: 1 is generation one token at a time, hundreds are a prompt.
            output: JSON file to write the figures to; null = none.
        """
        _refuse_lazy(model, "speed")
        tokens = as_list(tokens)
        if not tokens or not all(1 <= rows <= _MOST_ROWS for rows in tokens):
            raise InputError(f"tokens are {list(tokens)}: give numbers from 1 to {_MOST_ROWS:,}, such as [1, 16, 256]")
        masks = load_masks(model.pretrained)
        model.configure_model()
        with self._at_work(model) as whole:
            found = measure_speed(whole, masks, tokens)
        Console(quiet=self.quiet).print(speed_table(found))
        if output is not None:
            write_json(Path(output).expanduser(), [asdict(figure) for figure in found])
        return found

    def _scores(self, model: LitCausalLM, tasks: Sequence[str], harness: Harness) -> Scores:
        with self._at_work(model) as whole:
            return harness.evaluate(whole, model.load_tokenizer(), tasks)

    def _continuations(self, model: LitCausalLM, prompts: Sequence[str]) -> list[str]:
        with self._at_work(model) as whole:
            return continuations(whole, model.load_tokenizer(), prompts)

    @contextmanager
    def _at_work(self, model: LitCausalLM) -> Iterator[nn.Module]:
        """Yield the transformers model on the strategy's device, in evaluation mode."""
        home, training = model.device, model.model.training
        try:
            yield model.model.to(self.strategy.root_device).eval()
        finally:
            model.model.train(training).to(home)

    def analyze(
        self,
        model: LitCausalLM,
        datamodule: TextDataModule,
        output: str = "analysis",
        overwrite: bool = False,
        sparsities: Sequence[float] | float = (0.5, 0.6, 0.7, 0.8),
        histograms: Sequence[str] | str = (),
    ) -> None:
        """Tells how prunable each layer is, from the spectra of the weights; nothing is changed.

        The metric and its mapping are those of the AlphaPruning allocator of the Prune callback, where there is one.

        Args:
            model: The language model.
            datamodule: Not read.
            output: Folder to write: analysis.json and plots.
            overwrite: Replace the folder where it exists.
            sparsities: Targets to allocate for.
            histograms: Shell patterns over layer names: whose spectra are plotted with the fitted tail; none = those of
                the first block.
        """
        sparsities, histograms = as_list(sparsities), as_list(histograms)
        if not sparsities:
            raise InputError("sparsities are empty: give at least one, such as [0.5]")
        for sparsity in sparsities:
            check_sparsity(sparsity, "sparsities")
        check_output(output, overwrite, ANALYSIS, reads=[model.pretrained])
        model.configure_model()
        prunes = [callback for callback in self.callbacks if isinstance(callback, Prune)]  # type: ignore[attr-defined]
        plan = prunes[0].plan if prunes else PruningPlan(Unstructured(0.5), Magnitude())
        allocator = plan.allocator if isinstance(plan.allocator, AlphaPruning) else AlphaPruning()
        targets = plan.find_targets(model.model)[1]
        shown = histograms or [target.name for target in targets if target.block == targets[0].block]
        with Progress(disable=self.quiet) as bar:
            task = bar.add_task("analyzing", total=len(targets))
            advance = partial(bar.update, task)
            analysis = analyze(model.model, targets, allocator, sparsities, shown, lambda done: advance(completed=done))
        figures = analysis_figures(analysis)
        documents: dict[str, str | bytes] = {"analysis.json": as_json(analysis.as_dict())}
        documents |= {f"{name}.png": as_png(figure) for name, figure in figures.items()}
        folder = save_documents(output, documents, overwrite)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, figure in figures.items():
                    logger.experiment.add_figure(f"analysis/{name}", figure)
        self._show([analysis.table()], folder)

    def _show(self, tables: Sequence[Table], folder: Path) -> None:
        console = Console(quiet=self.quiet)
        console.print(*tables)
        for file in sorted(folder.iterdir()):
            console.print(f"wrote {file}", soft_wrap=True, highlight=False)


def _read_by(model: LitCausalLM, datamodule: TextDataModule, plan: PruningPlan) -> list[str]:
    """Return the names of what a pruning reads; some may be of the hub."""
    files = [getattr(plan.allocator, name, None) for name in ("path", "values")]
    texts = [*datamodule.sources.values(), datamodule.calibration, datamodule.tokenizer]
    return [name for name in (model.pretrained, model.lazy, *texts, *files) if name]


def _refuse_lazy(model: LitCausalLM, stage: str) -> None:
    if model.lazy is not None:
        raise InputError(f"model.lazy is {model.lazy!r}: {stage} needs the model whole; leave it out")
