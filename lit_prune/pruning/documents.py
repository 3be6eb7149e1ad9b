"""The report on disk: plots, an HTML page and a model card for people, and the data that it is read back from."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lit_prune.models.checkpoints import by_layer
from lit_prune.models.io import REPORT_FILE, read_json
from lit_prune.ops import PackedMask
from lit_prune.pruning.figures import as_png, by_block, kind_of
from lit_prune.pruning.report import PruningReport

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Pruning report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .15rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr:nth-child(even) {{ background: #f4f5f7 }}
img {{ max-width: 100% }} pre {{ background: #f4f5f7; padding: 1rem; overflow: auto }}
</style></head><body><h1>Pruning report</h1>
{summary}{plots}<h2>Layers</h2>{layers}<h2>Plan</h2><pre>{plan}</pre></body></html>
"""

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, sparse]
---

# {title}

Pruned with lit-prune. Open it with
`transformers.AutoModelForCausalLM.from_pretrained`; the zeros are in the weights.

| | |
|---|---|
{summary}

`masks.safetensors` holds the keep masks, one bit per weight. `pruning.json` and `report.html` say what happened to
every layer. The plan:

```json
{plan}
```
"""


def render(report: PruningReport, title: str) -> dict[str, str | bytes]:
    """Return every document of a pruned model's folder: file name to content."""
    plots = {"sparsity.png": as_png(by_block(_by_kind(report, "reached"), "sparsity", limits=(0, 1)))}
    if any(layer.output_error for layer in report.layers):
        errors = by_block(_by_kind(report, "output_error"), "relative output error", log=True)
        plots["output_error.png"] = as_png(errors)
    if report.reconstructions:
        blocks = {
            f"{when} reconstruction": [(done.block, getattr(done, when)) for done in report.reconstructions]
            for when in ("before", "after")
        }
        plots["block_error.png"] = as_png(by_block(blocks, "relative error of the block's output", log=True))
    if report.validation:
        curve = by_block(report.validation, "perplexity", log=True, over="optimizer step")
        plots["validation.png"] = as_png(curve)
    return {
        REPORT_FILE: json.dumps(report.as_dict(), indent=1),
        "report.html": _html(report, plots),
        "README.md": _card(report, title),
        **plots,
    }


def read_report(folder: str | Path, masks: Mapping[str, PackedMask]) -> PruningReport | None:
    """Return the report of a pruned folder, whose masks by parameter name are known; None where it holds no report."""
    file = Path(folder).expanduser() / REPORT_FILE
    return PruningReport.from_dict(read_json(file), by_layer(masks)) if file.is_file() else None


def _by_kind(report: PruningReport, attribute: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for layer in report.layers:
        series.setdefault(kind_of(layer.name), []).append((layer.block, getattr(layer, attribute)))
    return series


def _html(report: PruningReport, plots: dict[str, bytes]) -> str:
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in plots.items()
    )
    header = ("layer", "shape", "asked", "reached", "output error", "seconds")
    rows = [
        (
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{layer.asked:.4f}",
            f"{layer.reached:.4f}",
            "" if layer.output_error is None else f"{layer.output_error:.5f}",
            f"{layer.seconds:.2f}",
        )
        for layer in report.layers
    ]
    return _PAGE.format(
        summary=_rows(report.summary()),
        plots=images,
        layers=_rows(rows, header),
        plan=escape(json.dumps(report.identity, indent=1)),
    )


def _rows(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _card(report: PruningReport, title: str) -> str:
    summary = "\n".join(f"| {what} | {value} |" for what, value in report.summary())
    return _CARD.format(title=title, summary=summary, plan=json.dumps(report.identity["plan"], indent=1))
