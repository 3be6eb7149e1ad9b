"""Pages that open from disk: one file of HTML, no network, on a phone as on a desk, in the light and in the dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ --ink: #1d2129; --faint: #667; --paper: #fff; --panel: #f3f5f8; --line: #d8dde5; --accent: #1f6fbf }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ef; --faint: #9aa3b2; --paper: #14171c; --panel: #1e232b; --line: #343b47; --accent: #6db3f2 }}
}}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--paper) }}
h1 {{ font-size: 1.6rem; margin: 0 }} h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .5rem }}
p {{ margin: .4rem 0 .8rem; color: var(--faint) }}
.figures, .samples, .gallery {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0 }}
.figures div {{ background: var(--panel); border-radius: .5rem; padding: .7rem .9rem }}
.figures b {{ display: block; font-size: 1.15rem; overflow-wrap: break-word }} .figures span {{ color: var(--faint) }}
.wide {{ overflow-x: auto }} svg {{ width: 100%; height: auto; min-width: 34rem; font-family: inherit }}
.gallery svg {{ min-width: 0 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }} .facts td {{ white-space: normal }}
th {{ color: var(--faint); font-weight: 500 }} summary {{ cursor: pointer; color: var(--accent) }}
pre {{ background: var(--panel); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .85rem }}
.samples, .gallery {{ grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) }}
.samples div {{ background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; overflow-wrap: anywhere;
  white-space: pre-wrap }} .samples b {{ display: block; color: var(--faint); font-weight: 500 }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, *parts: str) -> str:
    """Return a page; the parts are HTML already."""
    return _PAGE.format(title=escape(title), body="\n".join(part for part in parts if part))


def section(title: str, remark: str, *parts: str) -> str:
    """Return a heading, a remark below it, and HTML; nothing if there are no parts."""
    return f"<h2>{escape(title)}</h2><p>{escape(remark)}</p>{''.join(parts)}" if any(parts) else ""


def headline(figures: Mapping[str, str]) -> str:
    """Return the few numbers that matter most, by what they are."""
    cells = "".join(f"<div><span>{escape(what)}</span><b>{escape(value)}</b></div>" for what, value in figures.items())
    return f'<div class="figures">{cells}</div>'


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return a table, which scrolls by itself if the screen is narrow."""
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of what and how much, whose cells are as high as they must be."""
    return f'<div class="facts">{table(rows)}</div>'


def plots(*figures: str) -> str:
    """Return SVG figures one below the other, which scroll by themselves if the screen is narrow."""
    return "".join(f'<div class="wide">{figure}</div>' for figure in figures if figure)


def gallery(figures: Sequence[str]) -> str:
    """Return small SVG figures side by side, as many as there is room for."""
    return f'<div class="gallery">{"".join(figures)}</div>' if figures else ""


def preformatted(text: str) -> str:
    """Return text that keeps its lines."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, html: str) -> str:
    """Return HTML that a click unfolds."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def samples(prompt: str, texts: Mapping[str, str]) -> str:
    """Return texts side by side that begin alike."""
    cells = "".join(
        f"<div><b>{escape(who)}</b>{escape(prompt)}<i>{escape(text)}</i></div>" for who, text in texts.items()
    )
    return f'<div class="samples">{cells}</div>'
