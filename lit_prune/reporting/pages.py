"""Rendering of the templates: self-contained HTML pages that need no network, and the model card."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

_TEMPLATES = Environment(
    loader=PackageLoader("lit_prune.reporting"),
    autoescape=select_autoescape(("html",)),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


def _cell(text: str) -> str:
    """Escape text for one cell of a Markdown table."""
    return _plain(text).replace("|", r"\|")


def _plain(text: str) -> str:
    """Escape text for a line of Markdown: no line breaks, control characters, HTML, links or code."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"([\\`<>\[\]])", r"\\\1", " ".join(line.split()))


def _fence(text: str) -> str:
    """Return text as a block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}json\n{text}\n{fence}"


_TEMPLATES.filters |= {"cell": _cell, "plain": _plain, "fence": _fence}


def render_page(template: str, **values: Any) -> str:
    """Render a template with its values; in HTML, everything except ``Markup`` is escaped."""
    return _TEMPLATES.get_template(template).render(values)
