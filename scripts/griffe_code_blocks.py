"""Convert ``.. code-block::`` in docstrings to fenced code blocks of Markdown, for the documentation site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


def fenced(text: str) -> str:
    """Return a docstring with its code blocks fenced."""

    def fence(match: re.Match[str]) -> str:
        code = "\n".join(line.removeprefix("    ") for line in match[2].rstrip().splitlines())
        return f"```{match[1]}\n{code}\n```\n\n"

    return _BLOCK.sub(fence, text)


class CodeBlocks(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
