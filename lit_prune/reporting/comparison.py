"""Comparison of several runs on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from lit_prune.checkpoint.files import read_json, write_atomically
from lit_prune.checkpoint.masks import REPORT_FILE, masks_of
from lit_prune.checkpoint.outputs import check_file
from lit_prune.checkpoint.plain_data import typed
from lit_prune.errors import InputError, first_line
from lit_prune.reporting.documents import read_report
from lit_prune.reporting.figures import Points, as_svg, by_block, scatter
from lit_prune.reporting.pages import render_page
from lit_prune.reporting.report import PruningReport
from lit_prune.reporting.summary import method, pattern, sparsity_of_model
from lit_prune.runtime.model_speed import ModelSpeed


def compare(
    runs: Sequence[str], output: str = "compare.html", overwrite: bool = False, speeds: Sequence[str] = ()
) -> Path:
    """Write a page that compares pruned folders: a table, and perplexity over sparsity, seconds and speed.

    Args:
        runs: Folders written by ``lit-prune``.
        output: HTML file to write.
        overwrite: Replace the file if it exists.
        speeds: Files that ``lit-prune speed --against`` wrote for these folders, in the same order; empty = none.

    Raises:
        InputError: if a folder contains no report, or a report in another format, or a file holds no speeds.
    """
    path = check_file(output, ".html", overwrite, [*runs, *speeds])
    names = _names(runs)
    if speeds and len(speeds) != len(runs):
        raise InputError(f"speeds has {len(speeds)} files for {len(runs)} folders: give one for each, in their order")
    reports = {name: _read(run) for name, run in zip(names, runs, strict=True)}
    page = comparison_page(reports, {name: _read_speeds(file) for name, file in zip(names, speeds, strict=False)})
    write_atomically(path, lambda temporary: temporary.write_bytes(page.encode(errors="replace")))
    return path


def comparison_page(reports: dict[str, PruningReport], speeds: Mapping[str, Sequence[ModelSpeed]] | None = None) -> str:
    """Return the HTML page that compares reports, given by name, with the speeds of their models, if there are any."""
    errors = {name: points for name, report in reports.items() if (points := _errors(report))}
    return render_page(
        "comparison.html",
        title=f"{len(reports)} pruned models",
        header=_HEADER,
        rows=[_row(name, report) for name, report in reports.items()],
        charts=[_charts(text, seqlen, found, speeds or {}) for (text, seqlen), found in _by_protocol(reports).items()],
        errors=as_svg(by_block(errors, "relative output error", log=True)) if errors else "",
    )


def _by_protocol(reports: dict[str, PruningReport]) -> dict[tuple[str, int], dict[str, PruningReport]]:
    """Group the evaluated reports by text and window, because only perplexities with equal ones are comparable."""
    found: dict[tuple[str, int], dict[str, PruningReport]] = {}
    for name, report in reports.items():
        if "perplexity_after" in report.evaluation:
            found.setdefault((report.evaluation["text"], report.evaluation["seqlen"]), {})[name] = report
    return found


def _charts(
    text: str, seqlen: int, reports: dict[str, PruningReport], speeds: Mapping[str, Sequence[ModelSpeed]]
) -> dict[str, Any]:
    after = {name: report.evaluation["perplexity_after"] for name, report in reports.items()}
    by_sparsity = {name: (report.sparsity, after[name]) for name, report in reports.items()}
    by_seconds = {name: (sum(report.seconds.values()), after[name]) for name, report in reports.items()}
    by_speed: dict[str, dict[str, tuple[float, float]]] = {}
    for name in reports:
        for speed in speeds.get(name, ()):
            by_speed.setdefault(speed.task, {})[name] = (speed.ratio, after[name])
    across = "speed, relative to the model that it was compared with"
    return {
        "text": f"{text}, windows of {seqlen} tokens",
        "speeds": {task: as_svg(scatter(points, across, "perplexity")) for task, points in by_speed.items()},
        "sparsity": as_svg(scatter(by_sparsity, "sparsity", "perplexity")),
        "seconds": as_svg(scatter(by_seconds, "seconds", "perplexity", log=True)),
    }


_HEADER = (
    "run",
    "method",
    "pattern",
    "sparsity",
    "of the model",
    "before",
    "after",
    "text",
    "window",
    "seconds",
    "peak memory",
)


def _row(name: str, report: PruningReport) -> list[str]:
    found = report.evaluation
    perplexities = [f"{found[key]:,.2f}" if key in found else "" for key in ("perplexity_before", "perplexity_after")]
    return [
        name,
        method(report),
        pattern(report),
        f"{report.sparsity:.2%}",
        "" if (whole := sparsity_of_model(report)) is None else f"{whole:.2%}",
        *perplexities,
        str(found.get("text", "")),
        str(found.get("seqlen", "")),
        f"{sum(report.seconds.values()):.0f}",
        "" if report.peak_memory is None else f"{report.peak_memory / 2**30:.2f} GiB",
    ]


def _errors(report: PruningReport) -> Points:
    return [
        (block, fmean(measured))
        for block, layers in report.blocks()
        if (measured := [layer.output_error for layer in layers if layer.output_error is not None])
    ]


def _read(run: str) -> PruningReport:
    report = read_report(run, masks_of(run)) if (Path(run).expanduser() / REPORT_FILE).is_file() else None
    if report is None:
        raise InputError(f"{run!r} is not a folder that lit-prune wrote: it holds no {REPORT_FILE}")
    return report


def _read_speeds(file: str) -> list[ModelSpeed]:
    try:
        return cast(list[ModelSpeed], typed(read_json(Path(file).expanduser()), list[ModelSpeed], "it"))
    except (OSError, TypeError) as error:
        raise InputError(
            f"speeds has {file!r}, which lit-prune speed --against did not write ({first_line(error)})"
        ) from error


def _names(runs: Sequence[str]) -> list[str]:
    """Return the folders' names, or their full paths if two names are equal."""
    names = [Path(run).name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
