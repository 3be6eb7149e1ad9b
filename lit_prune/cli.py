"""The command line: ``lit-prune prune | analyze | fit | validate | test``."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lit_prune.allocators import AlphaPruning
from lit_prune.callbacks import Export, KeepMasks, Prune  # noqa: F401 - their names are known to YAML from here on
from lit_prune.callbacks.prune import find_prune
from lit_prune.cli_errors import explain
from lit_prune.models.io import check_output, check_space, disable_model_progress_bars, save_documents, save_pruned
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan
from lit_prune.pruning.analysis import analyze
from lit_prune.pruning.documents import render
from lit_prune.pruning.figures import analysis_figures, as_png
from lit_prune.pruning.journal import Journal
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, TextDataModule

_FLAGS = ("--overwrite", "--resume")


class PruningTrainer(Trainer):
    """Lightning's Trainer that can also prune and analyze."""

    def prune(
        self,
        model: LitCausalLM,
        datamodule: TextDataModule,
        output: str = "pruned",
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        """Prunes a model once, evaluates it before and after, and saves it as a Hugging Face folder.

        Args:
            model: The language model.
            datamodule: Its calibration and test text.
            output: Folder to write.
            overwrite: Replace the folder where it exists.
            resume: Go on with a run that was killed, from its finished blocks.
        """
        callback = find_prune(self)
        folder = check_output(output, overwrite)
        model.configure_model()
        check_space(folder, model)
        callback.plan.find_targets(model.model)
        if callback.plan.needs_data:
            datamodule.calibration_batches()  # kept for the pruning itself; bad text is found out before any work
        journal = folder.with_name(f".{folder.name}.journal")
        before = self.test(model, datamodule, verbose=False)[0]
        with callback.at_next_test(journal, resume):
            after = self.test(model, datamodule, verbose=False)[0]
        report = callback.report
        assert report is not None
        report.evaluation = {
            "perplexity_before": before["test/perplexity"],
            "perplexity_after": after["test/perplexity"],
            "seqlen": datamodule.seqlen,
            "text": f"test text of {datamodule.sources['test']}",
        }
        documents = render(report, title=Path(model.pretrained).name)
        save_pruned(folder, model.model, model.load_tokenizer(), report.masks, documents, overwrite)
        Journal.remove(journal)
        _show([report.table(), report.summary_table()], folder)

    def analyze(
        self,
        model: LitCausalLM,
        datamodule: TextDataModule,
        output: str = "analysis",
        overwrite: bool = False,
        sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8),
        histograms: Sequence[str] = ("*.layers.0.*",),
    ) -> None:
        """Tells how prunable each layer is, from the spectra of the weights; nothing is changed.

        The metric and its mapping are those of the AlphaPruning allocator of the Prune callback, where there is one.

        Args:
            model: The language model.
            datamodule: Not read.
            output: Folder to write: analysis.json and plots.
            overwrite: Replace the folder where it exists.
            sparsities: Targets to allocate for.
            histograms: Shell patterns over layer names: whose spectra are plotted with the fitted tail.
        """
        check_output(output, overwrite, mark="analysis.json")
        model.configure_model()
        prunes = [callback for callback in self.callbacks if isinstance(callback, Prune)]  # type: ignore[attr-defined]
        plan = prunes[0].plan if prunes else PruningPlan(Unstructured(0.5), Magnitude())
        allocator = plan.allocator if isinstance(plan.allocator, AlphaPruning) else AlphaPruning()
        targets = plan.find_targets(model.model)[1]
        with Progress() as bar:
            task = bar.add_task("analyzing", total=len(targets))
            advance = partial(bar.update, task)
            analysis = analyze(
                model.model, targets, allocator, sparsities, histograms, lambda done: advance(completed=done)
            )
        figures = analysis_figures(analysis)
        documents: dict[str, str | bytes] = {"analysis.json": json.dumps(analysis.as_dict(), indent=1)}
        documents |= {f"{name}.png": as_png(figure) for name, figure in figures.items()}
        folder = save_documents(output, documents, overwrite)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, figure in figures.items():
                    logger.experiment.add_figure(f"analysis/{name}", figure)
        _show([analysis.table()], folder)


def _show(tables: Sequence[Table], folder: Path) -> None:
    console = Console()
    console.print(*tables)
    for file in sorted(folder.iterdir()):
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)


class PruningCLI(LightningCLI):
    """LightningCLI with the subcommands ``prune`` and ``analyze``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, and the arguments that are no options."""
        return {
            "prune": {"model", "datamodule"},
            "analyze": {"model", "datamodule"},
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--debug``, and give the data the model's tokenizer where none is named."""
        parser.add_argument("--debug", action="store_true", help="Show tracebacks.")

    def before_instantiate_classes(self) -> None:
        """Give the data the model's tokenizer where none is named."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.pretrained


def build(arguments: list[str], run: bool = True) -> PruningCLI:
    """Parse the arguments, build model, data and trainer, and carry the subcommand out (unless ``run`` is off)."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _silence_libraries()
    return PruningCLI(
        LitCausalLM,
        TextDataModule,
        trainer_class=PruningTrainer,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False},
        args=arguments,
        run=run,
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; a user's mistake is one line (a traceback with ``--debug``)."""
    arguments = _with_flags(sys.argv[1:] if args is None else args)
    try:
        build(arguments)
    except Exception as error:
        message = explain(error)
        if message is None or "--debug" in arguments:
            raise
        print(f"lit-prune: error: {message}", file=sys.stderr)
        return 2
    return 0


def _with_flags(arguments: Sequence[str]) -> list[str]:
    """Let ``--overwrite`` alone mean ``--overwrite=true``; jsonargparse wants a value for every bool."""
    following = [*arguments[1:], ""]
    return [
        f"{argument}=true" if argument in _FLAGS and value not in ("true", "false") else argument
        for argument, value in zip(arguments, following, strict=True)
    ]


def _silence_libraries() -> None:
    """Keep what the libraries say about themselves off the screen."""
    disable_model_progress_bars()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
