"""The command line: ``lit-prune prune | fit | validate | test``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from lit_prune.callbacks import Export, KeepMasks, Prune  # noqa: F401 - their names are known to YAML from here on
from lit_prune.callbacks.prune import find_prune
from lit_prune.cli_errors import explain
from lit_prune.models.io import check_output, check_space, disable_model_progress_bars, save_pruned
from lit_prune.pruning.documents import render
from lit_prune.pruning.journal import Journal
from lit_prune.pruning.report import PruningReport
from lit_prune.training import LitCausalLM, TextDataModule

_FLAGS = ("--overwrite", "--resume")


class PruningTrainer(Trainer):
    """Lightning's Trainer that can also prune."""

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
        _show(report, folder)


def _show(report: PruningReport, folder: Path) -> None:
    console = Console()
    console.print(report.table(), report.summary_table())
    for file in sorted(folder.iterdir()):
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)


class PruningCLI(LightningCLI):
    """LightningCLI with the subcommand ``prune``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, and the arguments that are no options."""
        return {
            "prune": {"model", "datamodule"},
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
