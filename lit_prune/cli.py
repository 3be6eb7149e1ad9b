"""The command line: ``lit-prune prune | analyze | fit | validate | test | evaluate | speed | export | compare``."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import distributed

import lit_prune.callbacks  # noqa: F401 - registers its class names for YAML
from lit_prune.arguments import overridden, pattern_value, prepare
from lit_prune.callbacks import Prune
from lit_prune.cli_errors import PEER_GONE, ArgumentsError, did_you_mean, explain, printable
from lit_prune.errors import InputError
from lit_prune.internals.distributed import default_store
from lit_prune.internals.lightning import config_value, subparser
from lit_prune.malloc import keep_freed_memory
from lit_prune.models.locate import hub_model, license_of
from lit_prune.models.quiet import disable_model_progress_bars, hide_choice_of_accelerator
from lit_prune.pruning import PruningPlan
from lit_prune.pruning.schedule import Schedule
from lit_prune.recipes import path_of
from lit_prune.reporting.comparison import compare
from lit_prune.reporting.report import Recipe
from lit_prune.signals import Interrupted, stopping_on_signals
from lit_prune.trainer import PruningTrainer
from lit_prune.training import LitCausalLM, TextDataModule

SUBCOMMANDS = {
    "prune": {"model", "datamodule"},
    "analyze": {"model", "datamodule"},
    "evaluate": {"model", "datamodule"},
    "speed": {"model", "datamodule"},
    "export": {"model", "datamodule"},
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
}
_PLAN_HELP = (
    "Pruning plan: the name of a shipped plan (see lit-prune recipes), a YAML file, or its parts. --sparsity 0.6 is "
    "short for --plan.pattern.sparsity 0.6, and --pattern 2:4 for an N:M pattern. Default: best for prune (best_nm for "
    "an N:M pattern), alphapruning for analyze."
)
_SCHEDULE_HELP = "Optimizer steps at which fit prunes; null = once, at the start."

_UNKNOWN_SUBCOMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)'")
_UNKNOWN_OPTION = re.compile(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)")
_PATIENCE = timedelta(seconds=20)
"""Time in which the first process meets the mistake of another one, or never."""
_SEEDS = 2**32
"""Number of valid seeds; NumPy's limit."""

_load_any_yaml = get_loader("yaml")


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration to the log folder; saves nothing without a logger, because there is no such folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class PruningCLI(LightningCLI):
    """LightningCLI with the subcommands ``prune``, ``analyze``, ``evaluate``, ``speed`` and ``export``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Store and preprocess the arguments, then initialize the parent class."""
        self.arguments: list[str] = list(kwargs["args"])
        self.prepared = prepare(self.arguments)
        for note in self.prepared.notes if os.environ.get("LOCAL_RANK", "0") == "0" else ():
            print(f"lit-prune: {note}", file=sys.stderr)
        super().__init__(*args, **{**kwargs, "args": self.prepared.arguments})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommands, each with the parameters that are not command-line options."""
        return _asked(self.arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--plan``, ``--schedule``, ``--debug`` and ``--quiet``."""
        parser.add_argument("--plan", type=PruningPlan | None, sub_configs=True, help=_PLAN_HELP)
        parser.add_argument("--schedule", type=Schedule | None, help=_SCHEDULE_HELP)
        parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
        parser.add_argument("--quiet", action="store_true", help="Show no progress and no tables.")

    def _parse_ckpt_path(self) -> None:
        # The parent class reads hyper-parameters from the checkpoint before it has been checked for safety; LitCausalLM
        # saves none.
        pass

    def _dump_config(self) -> None:
        self.config_dump: dict[str, Any] = {}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; every error is reported as an ``ArgumentsError``."""
        with _mistakes(self.arguments):
            try:
                if self.prepared.overrides:
                    args = [*args, f"--trainer.callbacks={self._overridden(parser, args)}"]
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise ArgumentsError(f"{error}{self._near(str(error))}") from error

    def _near(self, message: str) -> str:
        """Return a hint at the known option or subcommand that is closest to an unknown one."""
        if found := _UNKNOWN_SUBCOMMAND.search(message):
            return did_you_mean(found[1], [*SUBCOMMANDS, "compare"])
        if not (found := _UNKNOWN_OPTION.search(message)) or self.arguments[0] not in SUBCOMMANDS:
            return ""
        options = [option for action in subparser(self, self.arguments[0])._actions for option in action.option_strings]
        return did_you_mean(f"--{found[1]}", options)

    def _overridden(self, parser: LightningArgumentParser, args: list[str]) -> str:
        """Return ``trainer.callbacks`` as JSON, parsed from all other arguments, with the overrides applied."""
        config = parser.parse_args([argument for argument in args if not argument.startswith("--print_config")])
        config = config[config.subcommand] if config.get("subcommand") else config
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        return json.dumps(overridden([entry.as_dict() for entry in callbacks], self.prepared.overrides))

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, and store the command and configuration in the trainer."""
        with _mistakes(self.arguments):
            super().instantiate_classes()
        self.datamodule.use_tokenizer_of(self.model)
        parser = subparser(self, self.subcommand)
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        self.trainer.quiet = config.quiet  # type: ignore[attr-defined]
        self.trainer.recipe = Recipe(  # type: ignore[attr-defined]
            command=shlex.join(["lit-prune", *self.arguments]),
            config=parser.dump(config, skip_none=False),
            base_model=hub_model(self.model.pretrained),
            datasets=self.datamodule.hub_names(training=self.subcommand == "fit"),
            license=license_of(self.model.pretrained),
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; ``--plan`` is converted to a ``Prune`` callback before the others."""
        plan, schedule = config_value(self, self.config_init, "plan"), config_value(self, self.config_init, "schedule")
        settings = config_value(self, self.config_init, "trainer")
        callbacks = settings.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if plan is not None:
            if any(isinstance(callback, Prune) for callback in callbacks):
                raise InputError(
                    "plan is given, and trainer.callbacks has a Prune with its own plan: remove one of them"
                )
            callbacks = [Prune(plan, schedule), *callbacks]
        elif schedule is not None:
            raise InputError("schedule is given without a plan: name one with --plan, such as --plan wanda")
        return super().instantiate_trainer(**{**kwargs, "callbacks": callbacks})

    def _set_seed(self) -> None:
        """Seed everything; raise ``InputError`` if the seed is out of range."""
        seed = config_value(self, self.config, "seed_everything")
        if isinstance(seed, int) and not 0 <= seed < _SEEDS:
            raise InputError(f"--seed_everything is {seed}: it must be from 0 to {_SEEDS - 1:,}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Disable progress bar and model summary for ``--quiet``; refuse a scheduler without a class."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        scheduler = config.model.lr_scheduler
        if scheduler is not None and scheduler.class_path == "typing.Union":  # what the parser makes of {}
            raise InputError("model.lr_scheduler is {}: name a class, such as WarmupCosine, or null for constant rates")
        if config.quiet:
            config.trainer.enable_progress_bar = config.trainer.enable_model_summary = False


def _asked(arguments: Sequence[str]) -> dict[str, set[str]]:
    """Return only the requested subcommand if it is known, because building each parser takes half a second."""
    asked = arguments[0] if arguments else ""
    return {asked: SUBCOMMANDS[asked]} if asked in SUBCOMMANDS else SUBCOMMANDS


def build(arguments: list[str], run: bool = True) -> PruningCLI:
    """Parse the arguments, build model, data and trainer, and run the subcommand if ``run`` is True."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))
    _silence_libraries()
    return PruningCLI(
        LitCausalLM,
        TextDataModule,
        trainer_class=PruningTrainer,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "lit-prune",
            "exit_on_error": False,
            **{name: {"usage": f"lit-prune {name} [-c CONFIG ...] [--OPTION VALUE ...]"} for name in _asked(arguments)},
        },
        args=arguments,
        run=run,
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors are one line, or a traceback with ``--debug``."""
    keep_freed_memory()
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        if arguments[:1] == ["compare"]:
            _compare(arguments[1:])
        else:
            # During training, Lightning installs its own signal handlers.
            with nullcontext() if arguments[:1] == ["fit"] else stopping_on_signals():
                build(arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        message, status = explain(error)
        if not _printed_by_first(message):
            kind = "" if message == PEER_GONE else "error: "  # the other process has printed the error
            print(f"lit-prune: {kind}{printable(message)}", file=sys.stderr)
        return status
    except Interrupted as stop:
        print(f"lit-prune: {stop}", file=sys.stderr)
        return 128 + stop.number
    return 0


def _printed_by_first(message: str) -> bool:
    """Return whether the first process on this host prints the same message: all processes meet most mistakes.

    The others wait for it, in the store of their group, and print the message themselves if it does not come.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    key = f"lit_prune/{gethostname()}/{message}"
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            default_store().set(key, "")
            return False
        default_store().wait([key], _PATIENCE)
    except distributed.DistStoreError:  # too late
        return False
    except RuntimeError:  # the process that keeps the store has ended, and printed an error of its own
        return os.environ.get("LOCAL_RANK", "0") != "0"
    return True


def _compare(arguments: Sequence[str]) -> None:
    """Run ``compare``, the only subcommand of this parser without model, data and trainer."""
    parser = ArgumentParser(
        prog="lit-prune compare", description="Compare pruned folders on one page.", exit_on_error=False
    )
    parser.add_argument("runs", nargs="+", help="Folders that lit-prune wrote.")
    parser.add_argument("--output", default="compare.html", help="HTML file to write.")
    parser.add_argument(
        "--speeds", nargs="+", default=[], help="Files of lit-prune speed --against for these folders, in their order."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    options = parser.parse_args(arguments)
    print(f"wrote {compare(options.runs, options.output, options.overwrite, options.speeds)}")


@contextmanager
def _mistakes(arguments: Sequence[str]) -> Iterator[None]:
    """Convert any error of the parser, or of a class built from arguments, to an ``ArgumentsError``."""
    try:
        yield
    except UnicodeDecodeError as error:
        values = [argument.partition("=")[2] or argument for argument in arguments]
        named = next((repr(value) for value in values if _undecodable(value)), "a file named in a configuration")
        raise ArgumentsError(
            f"{named} is not text in UTF-8 ({error.reason} at byte {error.start}): give a YAML file in UTF-8"
        ) from error
    except Exception as error:
        raise ArgumentsError(str(error)) from error


def _undecodable(value: str) -> bool:
    """Return whether an argument names a file that is not UTF-8 text."""
    try:
        return Path(value).expanduser().is_file() and not Path(value).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return True
    except (OSError, RuntimeError, ValueError):  # not a file name
        return False


def _load_yaml(text: str) -> Any:
    """Load a configuration; raise ``YAMLError`` for a duplicate key in a mapping, which YAML forbids."""
    _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    content = _load_any_yaml(text)
    if not isinstance(content, dict):
        return content
    plan = content.get("plan")
    if isinstance(plan, str):
        content["plan"] = path_of("plan", plan) or plan
    for place in (content, plan):  # a file with only a plan, or a configuration with a plan
        if isinstance(place, dict) and isinstance(place.get("pattern"), (str, int)):
            place["pattern"] = _pattern(place["pattern"])
    return content


def _pattern(value: str | int) -> Any:
    """Return a pattern for the parser: N:M as a class with its arguments."""
    if isinstance(value, int):  # YAML 1.1 reads 2:4 as a number in base 60
        raise yaml.YAMLError(f"pattern is {value}: write N:M as 2of4, or in quotes, as '2:4'")
    return yaml.safe_load(pattern_value(value))


def _refuse_repeated_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"the key {key!r} appears twice")
        for _, value in node.value:
            _refuse_repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value)


def _silence_libraries() -> None:
    """Suppress tips and irrelevant warnings of the libraries."""
    disable_model_progress_bars()
    hide_choice_of_accelerator()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
