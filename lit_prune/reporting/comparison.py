"""Several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lit_prune.checkpoint.files import write_atomically
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.outputs import check_file
from lit_prune.checkpoint.save import REPORT_FILE
from lit_prune.errors import InputError
from lit_prune.reporting import pages
from lit_prune.reporting.documents import read_report
from lit_prune.reporting.figures import Points, as_svg, by_block, scatter
from lit_prune.reporting.report import PruningReport


def compare(runs: Sequence[str], output: str = "compare.html", overwrite: bool = False) -> Path:
    """Write a page that sets pruned folders side by side: a table, and perplexity against sparsity and seconds.

    Args:
        runs: Folders that ``lit-prune`` wrote.
        output: HTML file to write.
        overwrite: Replace the file if it exists.

    Raises:
        InputError: if a folder holds no report, or one of another format.
    """
    path = check_file(output, ".html", overwrite, runs)
    page = comparison_page({name: _read(run) for name, run in zip(_names(runs), runs, strict=True)})
    write_atomically(path, lambda temporary: temporary.write_bytes(page.encode(errors="replace")))
    return path


def comparison_page(reports: dict[str, PruningReport]) -> str:
    """Return the page of reports by name."""
    evaluated = {name: report for name, report in reports.items() if "perplexity_after" in report.evaluation}
    protocols = {(r.evaluation["text"], r.evaluation["seqlen"]) for r in evaluated.values()}
    seconds = {name: sum(report.seconds.values()) for name, report in evaluated.items()}
    after = {name: report.evaluation["perplexity_after"] for name, report in evaluated.items()}
    errors = {name: _errors(report) for name, report in reports.items()}
    return pages.page(
        f"{len(reports)} pruned models",
        pages.section(
            "Side by side",
            "" if len(protocols) < 2 else "The perplexities are of different texts or windows: they do not compare.",
            pages.table([_row(name, report) for name, report in reports.items()], _HEADER),
        ),
        pages.section(
            "Perplexity against sparsity",
            "Further down is better, further right is smaller.",
            pages.plots(_scatter({name: (reports[name].sparsity, after[name]) for name in after}, "sparsity")),
        ),
        pages.section(
            "Perplexity against time",
            "Of pruning alone.",
            pages.plots(_scatter({name: (seconds[name], after[name]) for name in after}, "seconds", log=True)),
        ),
        pages.section(
            "Output error by block",
            "The mean over a block's layers, as the solver left them.",
            pages.plots(as_svg(by_block(drawn, "relative output error", log=True)))
            if (drawn := {name: points for name, points in errors.items() if points})
            else "",
        ),
    )


_HEADER = ("run", "method", "pattern", "sparsity", "before", "after", "text", "window", "seconds", "peak memory")


def _row(name: str, report: PruningReport) -> list[str]:
    found = report.evaluation
    perplexities = [f"{found[key]:,.2f}" if key in found else "" for key in ("perplexity_before", "perplexity_after")]
    return [
        name,
        report.method,
        report.pattern,
        f"{report.sparsity:.2%}",
        *perplexities,
        str(found.get("text", "")),
        str(found.get("seqlen", "")),
        f"{sum(report.seconds.values()):.0f}",
        "" if report.peak_memory is None else f"{report.peak_memory / 2**30:.2f} GiB",
    ]


def _scatter(points: dict[str, tuple[float, float]], across: str, log: bool = False) -> str:
    return as_svg(scatter(points, across, "perplexity", log)) if points else ""


def _errors(report: PruningReport) -> Points:
    return [
        (block, fmean(measured))
        for block, layers in report.blocks()
        if (measured := [layer.output_error for layer in layers if layer.output_error is not None])
    ]


def _read(run: str) -> PruningReport:
    report = read_report(run, load_masks(run)) if (Path(run).expanduser() / REPORT_FILE).is_file() else None
    if report is None:
        raise InputError(f"{run!r} is not a folder that lit-prune wrote: it holds no {REPORT_FILE}")
    return report


def _names(runs: Sequence[str]) -> list[str]:
    """Return the folders' names, or their whole paths where two have one name."""
    names = [Path(run).name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
