"""Imported once by the server that test processes are forked from, which then have parsed the docstrings already."""

import io
from contextlib import redirect_stdout, suppress

import support.docstrings  # noqa: F401
from lit_prune.cli import main

_COMMANDS = (
    ["prune", "--model.pretrained", "random", "--plan", "admm", "--plan.allocator", "AlphaPruning"],
    ["fit", "-c", "recipes/gradual"],
)

for _command in _COMMANDS:
    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        main([*_command, "--print_config"])
