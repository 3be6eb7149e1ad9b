"""Write the help of every subcommand to lit_prune/help, where the command line and the documentation read it.

python scripts/write_help.py          # after a change of the command line
python scripts/write_help.py --check  # exit 1 if a file differs from the parser's help
"""

import io
import os
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import version
from pathlib import Path

import docstring_parser

from lit_prune.cli import SUBCOMMANDS, main

docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)  # eight parsers read the same classes

FOLDER = Path(__file__).parents[1] / "lit_prune" / "help"
WIDTH = 100


def made_with() -> str:
    """Return the versions of the packages that affect the text."""
    lightning = ".".join(version("lightning").split(".")[:2])
    python = ".".join(map(str, sys.version_info[:2]))
    return f"Python {python}, jsonargparse {version('jsonargparse')}, lightning {lightning}"


def help_of(command: str) -> str:
    """Return the help of a subcommand's parser."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            main([command, "--help"])
    except SystemExit:
        pass
    return "\n".join(line.rstrip() for line in said.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(WIDTH)
    differing = []
    for command in SUBCOMMANDS:
        file, text = FOLDER / f"{command}.txt", f"{made_with()}\n{help_of(command)}"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            differing.append(command)
        if sys.argv[1:] != ["--check"]:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    if sys.argv[1:] == ["--check"] and differing:
        sys.exit(f"help of {', '.join(differing)} is not that of the parser: run python scripts/write_help.py")
