"""Imported once by the server that test processes are forked from, which then have parsed the docstrings already."""

import io
from contextlib import redirect_stdout, suppress

import support.docstrings
import support.figures
import support.tokens  # noqa: F401
from lit_prune.cli import build

_COMMANDS = (
    ["prune", "--model.pretrained", "random", "--plan", "admm", "--plan.allocator", "AlphaPruning"],
    ["fit", "-c", "recipes/gradual"],
)

for _command in _COMMANDS:
    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        build([*_command, "--print_config"])  # main would also set what a process inherits, such as malloc
