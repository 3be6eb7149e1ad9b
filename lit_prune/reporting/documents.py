"""Report files: plots, an HTML page, a model card, and the data from which a report is read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from matplotlib.figure import Figure

from lit_prune.checkpoint.files import as_json, read_json
from lit_prune.checkpoint.folders import inside
from lit_prune.checkpoint.masks import REPORT_FILE
from lit_prune.checkpoint.save import Format
from lit_prune.checkpoint.training_checkpoints import by_layer
from lit_prune.ops import PackedMask
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
from lit_prune.reporting.outliers import Outlier, outliers
from lit_prune.reporting.pages import render_page
from lit_prune.reporting.report import LayerReport, PruningReport
from lit_prune.reporting.summary import evaluation_rows, method, pattern, sparsity_of_model, summary, verdict

PAGE_FILE = "report.html"
_PLOTS = ("sparsity", "output_error", "block_error", "validation")
"""Figures that are also written as files, for the model card."""

_DRAWN = (*_PLOTS, "metric", "masks", "seconds")
"""Figures that the template of the page refers to."""
_OFF_THE_SCALE = 1e100
"""Perplexities from this value on are not plotted."""


def render(report: PruningReport, title: str, to: Format = "hf", adapters: bool = False) -> dict[str, str | bytes]:
    """Return every document of a pruned model's folder, as content by file name.

    Args:
        report: report of the pruning.
        title: title of the page and the model card.
        to: format of the weights in the folder.
        adapters: whether the folder contains plain adapters.
    """
    standing_out = outliers(report.layers)
    figures = report_figures(report, standing_out)
    plots = {f"{name}.png": as_png(figures[name]) for name in _PLOTS if name in figures}
    return {
        REPORT_FILE: as_json(report.as_dict()),
        PAGE_FILE: _page(report, title, {name: as_svg(figure) for name, figure in figures.items()}, standing_out),
        "README.md": _card(report, title, list(plots), to, adapters),
        **plots,
    }


def read_report(folder: str | Path, masks: Mapping[str, PackedMask]) -> PruningReport | None:
    """Return the report of a pruned folder with the given masks by parameter name; None if there is no report."""
    file = inside(Path(folder).expanduser(), REPORT_FILE)
    return PruningReport.from_dict(read_json(file), by_layer(masks), repr(str(file))) if file.is_file() else None


def report_figures(report: PruningReport, marked: Sequence[Outlier] = ()) -> dict[str, Figure]:
    """Return the figures of a report for which there is data, by name; the errors of ``marked`` layers are ringed."""
    figures = {"sparsity": by_block(_by_kind(report, lambda layer: layer.reached), "sparsity", limits=(0, 1))}
    if any(layer.output_error for layer in report.layers):
        errors = _by_kind(report, lambda layer: layer.output_error)
        rings = [(outlier.layer.block, outlier.layer.output_error or 0.0) for outlier in marked]
        figures["output_error"] = by_block(errors, "relative output error", log=True, rings=rings)
    if report.reconstructions:
        blocks: dict[str, Points] = {
            f"{when} reconstruction": [(done.block, getattr(done, when)) for done in report.reconstructions]
            for when in ("before", "after")
        }
        figures["block_error"] = by_block(blocks, "relative error of the block's output", log=True)
    if report.validation:
        # Perplexities of a diverged training exceed the range of a logarithmic axis.
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


def _by_kind(
    report: PruningReport, value: Callable[[LayerReport], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """Return a curve over the blocks for each kind of layer; a single curve if all values are equal.

    Layers without a value are left out.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for layer in report.layers:
        if (found := value(layer)) is not None:
            series.setdefault(kind_of(layer.name), []).append((layer.block, found))
    points = sorted({(block, round(y, 4)) for curve in series.values() for block, y in curve})
    if len(series) > 1 and len({y for _, y in points}) == 1:
        return {"all layers": points}  # equal curves would hide one another
    return series


def _page(report: PruningReport, title: str, figures: Mapping[str, str], standing_out: Sequence[Outlier]) -> str:
    """Return the report as an HTML page."""
    return render_page(
        "report.html",
        title=f"{title}, pruned",
        verdict=verdict(report),
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        samples=report.samples,
        figures={name: figures.get(name, "") for name in _DRAWN},
        spectra=[svg for name, svg in figures.items() if name.startswith("esd_")],
        layers=[_row(layer) for layer in report.layers],
        outliers=standing_out,
        outlier_names={outlier.layer.name for outlier in standing_out},
        summary=summary(report),
        recipes=report.recipes,
        identity=as_json(report.identity),
    )


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]} x {layer.shape[1]}",
        f"{layer.asked:.4f}",
        f"{layer.reached:.4f}",
        "" if layer.output_error is None else f"{layer.output_error:.5f}",
        f"{layer.seconds:.2f}",
    )


def _card(report: PruningReport, title: str, plots: Sequence[str], to: Format, adapters: bool) -> str:
    """Return the report as a model card for the Hugging Face hub."""
    recipes = report.recipes
    base_model = next((recipe.base_model for recipe in recipes if recipe.base_model), None)
    license = next((recipe.license for recipe in recipes if recipe.license), None)
    scores = _results(report)
    front = ModelCardData(
        base_model=base_model,
        license=license,
        datasets=sorted({name for recipe in recipes for name in recipe.datasets}) or None,
        metrics=sorted({score.metric_type for score in scores}) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", *([] if report.kept else ["sparse"]), "lit-prune"],
        model_name=f"{title}-pruned",
        eval_results=[score for score in scores if math.isfinite(score.metric_value)] or None,
    )
    whole = sparsity_of_model(report)
    return render_page(
        "card.md",
        front=front.to_yaml(),
        title=title,
        to=to,
        adapters=adapters,
        smaller=bool(report.kept),
        uneven=report.uneven,
        base_model=base_model,
        license=license,
        method=method(report),
        pattern=pattern(report),
        sparsity=f"{report.sparsity:.2%}",
        whole="" if whole is None else f"{whole:.2%}",
        evaluation=evaluation_rows(report),
        summary=summary(report),
        plots=plots,
        plan=as_json(report.identity["plan"]),
    )


def _results(report: PruningReport) -> list[EvalResult]:
    """Return the scores of the pruned model for the metadata of the model card."""
    scores = []
    if "perplexity_after" in report.evaluation:
        text, seqlen = report.evaluation["text"], report.evaluation["seqlen"]
        name = f"{text}, windows of {seqlen} tokens"
        scores.append(_result(text, name, "perplexity", report.evaluation["perplexity_after"]))
    tasks = report.evaluation["tasks"]["after"] if "tasks" in report.evaluation else {}
    for task, metrics in tasks.items():
        scores += [_result(task, task, name, value) for name, value in metrics.items() if not name.endswith("_stderr")]
    return scores


def _result(dataset_type: str, dataset_name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        metric_type=metric,
        metric_value=value,
    )
