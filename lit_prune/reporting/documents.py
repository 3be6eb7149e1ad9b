"""The report on disk: plots, an HTML page and a model card for people, and the data that it is read back from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from matplotlib.figure import Figure

from lit_prune.checkpoint.files import as_json, read_json
from lit_prune.checkpoint.folders import inside
from lit_prune.checkpoint.save import REPORT_FILE, Format
from lit_prune.checkpoint.training_checkpoints import by_layer
from lit_prune.ops import PackedMask
from lit_prune.reporting import pages
from lit_prune.reporting.figures import (
    Points,
    as_png,
    as_svg,
    bars,
    by_block,
    histogram,
    kind_of,
    mask_pictures,
)
from lit_prune.reporting.report import LayerReport, PruningReport

PAGE_FILE = "report.html"
_CARD = """---
{front}
---

# {title}, pruned

{sparsity} of the targeted weights are zero: {method}. It opens with
{opens}.{beside}

| | |
|---|---|
{summary}

{plots}

`masks.safetensors` holds the keep masks, one bit per weight. `pruning.json` and `report.html` say what happened to
every layer. The plan:

```json
{plan}
```
"""
_BESIDE = """

The model was trained with the low-rank adapters in the folder `adapter`, and is worse without them:
`peft.PeftModel.from_pretrained(model, "FOLDER/adapter")` puts them on."""
_PLOTS = ("sparsity", "output_error", "block_error", "validation")
"""Figures that are files too, for the model card."""

_OFF_THE_SCALE = 1e100
"""Perplexities that are not plotted."""


def render(report: PruningReport, title: str, to: Format = "hf", adapters: bool = False) -> dict[str, str | bytes]:
    """Return every document of a pruned model's folder: name to content.

    Args:
        report: what was done.
        title: of the page and the card.
        to: the form in which the weights lie there.
        adapters: whether plain adapters lie beside them.
    """
    figures = report_figures(report)
    plots = {f"{name}.png": as_png(figures[name]) for name in _PLOTS if name in figures}
    return {
        REPORT_FILE: as_json(report.as_dict()),
        PAGE_FILE: _page(report, title, {name: as_svg(figure) for name, figure in figures.items()}),
        "README.md": _card(report, title, list(plots), to, adapters),
        **plots,
    }


def read_report(folder: str | Path, masks: Mapping[str, PackedMask]) -> PruningReport | None:
    """Return the report of a pruned folder, whose masks by parameter name are known; None if it holds no report."""
    file = inside(Path(folder).expanduser(), REPORT_FILE)
    return PruningReport.from_dict(read_json(file), by_layer(masks), repr(str(file))) if file.is_file() else None


def report_figures(report: PruningReport) -> dict[str, Figure]:
    """Return every figure that there is something to show in, by name."""
    figures = {"sparsity": by_block(_by_kind(report, lambda layer: layer.reached), "sparsity", limits=(0, 1))}
    if any(layer.output_error for layer in report.layers):
        errors = _by_kind(report, lambda layer: layer.output_error or 0.0)
        figures["output_error"] = by_block(errors, "relative output error", log=True)
    if report.reconstructions:
        blocks: dict[str, Points] = {
            f"{when} reconstruction": [(done.block, getattr(done, when)) for done in report.reconstructions]
            for when in ("before", "after")
        }
        figures["block_error"] = by_block(blocks, "relative error of the block's output", log=True)
    if report.validation:
        # A training that diverged has figures that no logarithmic axis takes.
        course = {text: [(s, v) for s, v in points if v < _OFF_THE_SCALE] for text, points in report.validation.items()}
        figures["validation"] = by_block(course, "perplexity", log=True, over="optimizer step")
    if report.metrics:
        metrics = _by_kind(report, lambda layer: report.metrics[layer.name])
        figures["metric"] = by_block(metrics, "the allocator's metric")
    for name, spectrum in report.spectra.items():
        figures[f"esd_{name}"] = histogram(name, np.array(spectrum.eigenvalues), spectrum.tail)
    if report.layers:
        blocks_of = sorted({layer.block for layer in report.layers})
        middle = blocks_of[len(blocks_of) // 2]
        figures["masks"] = mask_pictures({layer.name: layer.mask for layer in report.layers if layer.block == middle})
    if report.seconds:
        figures["seconds"] = bars(report.seconds, "seconds")
    return figures


def _by_kind(report: PruningReport, value: Callable[[LayerReport], float]) -> dict[str, list[tuple[float, float]]]:
    """Return a curve over the blocks for each kind of layer; a single one if all values are equal."""
    series: dict[str, list[tuple[float, float]]] = {}
    for layer in report.layers:
        series.setdefault(kind_of(layer.name), []).append((layer.block, value(layer)))
    points = sorted({(block, round(y, 4)) for curve in series.values() for block, y in curve})
    if len(series) > 1 and len({y for _, y in points}) == 1:
        return {"all layers": points}  # equal curves would hide one another
    return series


def _page(report: PruningReport, title: str, figures: Mapping[str, str]) -> str:
    """Return the report as a page."""
    spectra = [svg for name, svg in figures.items() if name.startswith("esd_")]
    return pages.page(
        f"{title}, pruned",
        pages.headline(report.headline()),
        pages.section("What was asked, what came out", "", pages.facts(report.summary())),
        pages.section(
            "What it writes",
            "The likeliest continuation of the same beginning, by the dense model and by this one.",
            *(
                pages.samples(sample.prompt, {"before": sample.before, "after": sample.after})
                for sample in report.samples
            ),
        ),
        pages.section(
            "Perplexity while training",
            "Of each validation text; a curve that rises while another falls tells of over-fitting.",
            pages.plots(figures.get("validation", "")),
        ),
        pages.section(
            "Sparsity by layer",
            "The share of each layer's weights that is zero, by block.",
            pages.plots(figures.get("sparsity", "")),
        ),
        pages.section(
            "Output error by layer",
            "How far each layer's outputs on the calibration text have moved, as the solver left it: ‖X(W' − W)ᵀ‖² / "
            "‖XWᵀ‖².",
            pages.plots(figures.get("output_error", "")),
        ),
        pages.section(
            "Reconstruction",
            "How far each block's outputs are from the dense block's, before its kept weights were trained and after.",
            pages.plots(figures.get("block_error", "")),
        ),
        pages.section(
            "What the allocation was made from",
            "The shape metric of each weight's spectrum: layers with a heavier tail keep more.",
            pages.plots(figures.get("metric", "")),
            pages.gallery(spectra),
        ),
        pages.section(
            "Masks",
            "The layers of the middle block, as they are stored: full colour where all weights are kept, none where "
            "none is.",
            pages.plots(figures.get("masks", "")),
        ),
        pages.section("Time by stage", "", pages.plots(figures.get("seconds", ""))),
        pages.section("Layers", "", pages.folded(f"all {len(report.layers)}", _layers(report))),
        pages.section(
            "Do it again",
            "The command and the whole configuration of this run.",
            *(pages.preformatted(text) for recipe in report.recipes for text in (recipe.command, recipe.config)),
        ),
        pages.section(
            "Plan, model and data",
            "",
            pages.folded("as JSON", pages.preformatted(as_json(report.identity))),
        ),
    )


def _layers(report: PruningReport) -> str:
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
    return pages.table(rows, ("layer", "shape", "asked", "reached", "output error", "seconds"))


def _card(report: PruningReport, title: str, plots: Sequence[str], to: Format, adapters: bool) -> str:
    """Return the model card of the Hugging Face hub."""
    scores = []
    if "perplexity_after" in report.evaluation:
        text, seqlen = report.evaluation["text"], report.evaluation["seqlen"]
        name = f"{text}, windows of {seqlen} tokens"
        scores.append(_result(text, name, "perplexity", report.evaluation["perplexity_after"]))
    tasks = report.evaluation["tasks"]["after"] if "tasks" in report.evaluation else {}
    for task, metrics in tasks.items():
        scores += [_result(task, task, name, value) for name, value in metrics.items() if not name.endswith("_stderr")]
    front = ModelCardData(
        base_model=next((recipe.base_model for recipe in report.recipes if recipe.base_model), None),
        datasets=sorted({name for recipe in report.recipes for name in recipe.datasets}) or None,
        metrics=sorted({score.metric_type for score in scores}) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "lit-prune"],
        model_name=f"{title}-pruned",
        eval_results=[score for score in scores if math.isfinite(score.metric_value)] or None,
    )
    return _CARD.format(
        front=front.to_yaml(),
        title=title,
        opens="`lit_prune.load_model`, which puts the zeros back to the bit"
        if to == "bitmask"
        else "plain `transformers.AutoModelForCausalLM.from_pretrained`; the zeros are in the weights",
        beside=_BESIDE if adapters else "",
        method=report.method,
        sparsity=f"{report.sparsity:.2%}",
        summary="\n".join(f"| {what} | {value} |" for what, value in report.summary()),
        plots="\n\n".join(f"![{plot.removesuffix('.png').replace('_', ' ')}]({plot})" for plot in plots),
        plan=as_json(report.identity["plan"]),
    )


def _result(dataset_type: str, dataset_name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        metric_type=metric,
        metric_value=value,
    )
