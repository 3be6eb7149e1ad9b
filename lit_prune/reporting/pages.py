"""Rendering of the templates: self-contained HTML pages that need no network, and the model card."""

from __future__ import annotations

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
    return " ".join(text.split()).replace("|", r"\|")


_TEMPLATES.filters["cell"] = _cell


def render_page(template: str, **values: Any) -> str:
    """Render a template with its values; in HTML, everything except ``Markup`` is escaped."""
    return _TEMPLATES.get_template(template).render(values)
