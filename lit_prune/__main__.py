"""The command ``lit-prune``; requests that need no model are answered without importing torch."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import lit_prune

COMMANDS = {
    "prune": "Prunes a model once, evaluates it before and after, and saves it as a Hugging Face folder.",
    "analyze": "Reports the prunability of each layer from its weight spectrum; changes nothing.",
    "fit": "Trains a model and prunes it on schedule.",
    "validate": "Evaluates a model on the validation text.",
    "test": "Evaluates a model on the test text.",
    "evaluate": "Runs lm-evaluation-harness tasks on a model; validate and test measure its perplexity.",
    "speed": "Times a model on this machine: as a whole against another one, or layer by layer in sparse formats.",
    "export": "Converts a training checkpoint or a pruned folder to a folder for publication, and verifies the masks.",
    "compare": "Compares pruned folders on one page.",
    "recipes": "Lists the shipped configurations: name, summary and path.",
}
"""Subcommands and their summaries."""
_CONFIGURATION = re.compile(r"[^\s=:'\",\[\]{}]+\.ya?ml\b")
"""Regular expression of YAML file names. JSON is left out: it may be data, such as an allocation, and data must not
name classes."""
_FIRST_OF_PATH = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?=\.[A-Za-z_])")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if args is None else args)
    answer = _answer(arguments)
    try:
        status = _run(arguments) if answer is None else _show(answer)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader closed the pipe, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _answer(arguments: Sequence[str]) -> str | None:
    """Return the answer to a request that needs no model; None for any other."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return overview()
    if arguments[0] == "--version":
        return f"lit-prune {lit_prune.__version__}"
    if arguments[1:] in (["-h"], ["--help"]) and (written := written_help(arguments[0])):
        return written.rstrip("\n")
    return recipes() if arguments[0] == "recipes" else None


def _show(answer: str) -> int:
    try:
        print(answer, flush=True)
        return 0
    except BrokenPipeError:
        raise
    except OSError as error:  # such as a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"lit-prune: error: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    try:
        sys.meta_path.append(OwnModules(arguments))
        from lit_prune.cli import main as run

        return run(arguments)
    except KeyboardInterrupt:  # before signal handlers are installed: importing torch takes seconds
        print("lit-prune: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT


class OwnModules(MetaPathFinder):
    """Finds modules in the working directory, after all other finders, if the arguments name a class in them.

    Other modules are not found there: libraries try to import dozens of optional packages, and would run files of those
    names in the folder of a downloaded model.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """Collect the first component of every dotted path in the arguments and in the configurations they name."""
        self._folder = _working_directory()
        texts = [*arguments, *_configurations(arguments)]
        self._named = {match[0] for text in texts for match in _FIRST_OF_PATH.finditer(text)}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module in the working directory, and append that directory to ``sys.path``."""
        if path is not None or fullname not in self._named or self._folder is None:
            return None
        found = PathFinder.find_spec(fullname, [self._folder], target)
        if found and self._folder not in sys.path:
            sys.path.append(self._folder)
        return found


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the working directory was removed
        return None


def _configurations(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the text of every configuration that the arguments name, directly or through other configurations."""
    left = [(Path(), argument) for argument in arguments]
    seen: set[Path] = set()
    while left:
        folder, text = left.pop()
        for match in _CONFIGURATION.finditer(text):
            for parent in {Path(), folder}:
                try:
                    path = (parent / Path(match[0]).expanduser()).resolve()
                    if path not in seen and path.is_file():
                        seen.add(path)
                        left.append((path.parent, path.read_text(encoding="utf-8")))
                        yield left[-1][1]
                except (OSError, RuntimeError, ValueError):  # not the name of a text file
                    continue


def overview() -> str:
    """Return the help of the whole command line."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return dedent(
        """\
        usage: lit-prune COMMAND [-c CONFIG ...] [--OPTION VALUE ...]

        Prune large language models, keep the masks, recover the accuracy.

        {commands}

        examples:
          lit-prune prune --model.pretrained MODEL --plan wanda --sparsity 0.5
          lit-prune prune -c models/smollm2 -c data/wikitext2 --pattern 2:4
          lit-prune fit -c recipes/recover --sparsity 0.6 -c strategies/zero3

        lit-prune COMMAND --help shows its options, lit-prune prune --plan.solver.help ADMM those of a part of the plan.
        lit-prune --version shows the version."""
    ).format(commands=commands)


def written_help(command: str) -> str | None:
    """Return a subcommand's help as written by scripts/write_help.py; None if it is for another version of Lightning.

    Saves building the parser, which takes seconds.
    """
    file = Path(__file__).parent / "help" / f"{command}.txt"
    if command not in COMMANDS or not file.is_file():
        return None
    versions, _, text = file.read_text(encoding="utf-8").partition("\n")
    installed = ".".join(version("lightning").split(".")[:2])
    return text if f"lightning {installed}" in versions else None


def recipes() -> str:
    """Return a table of the shipped configurations."""
    from lit_prune.recipes import shipped

    items = shipped()
    width = max(len(item.name) for item in items)
    return "\n".join(f"{item.name:{width}}  {item.summary}\n{'':{width}}  {item.path}" for item in items)


if __name__ == "__main__":
    sys.exit(main())
