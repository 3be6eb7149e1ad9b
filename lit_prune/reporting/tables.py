"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import StringIO

from rich.console import Console, JustifyMethod
from rich.table import Table

from lit_prune.reporting.report import PruningReport, weighted
from lit_prune.reporting.summary import number_of_bytes, scores_of, summary
from lit_prune.runtime.model_speed import ModelSpeed
from lit_prune.runtime.sparse_layers import Speed


def blocks_table(report: PruningReport) -> Table:
    """Return a table with a row for every block."""
    table = Table(title="Pruned blocks")
    headings = ["block", "layers", "weights", "sparsity", "worst output error", "seconds"]
    reconstructed = {done.block: f"{done.before:.4f} to {done.after:.4f}" for done in report.reconstructions}
    if reconstructed:
        headings.append("reconstructed, error")
    for heading in headings:
        table.add_column(heading, justify="right")
    for index, layers in report.blocks():
        worst = max(layers, key=lambda layer: layer.output_error or 0.0)
        name = worst.name.rsplit(".", 1)[-1]
        table.add_row(
            str(index),
            str(len(layers)),
            f"{sum(layer.numel for layer in layers):,}",
            f"{weighted(layers, 'reached'):.2%}",
            "not measured" if worst.output_error is None else f"{worst.output_error:.4f} {name}",
            f"{sum(layer.seconds for layer in layers):.1f}",
            *([reconstructed.get(index, "")] if reconstructed else []),
        )
    return table


def summary_table(report: PruningReport) -> Table:
    """Return the summary of a report as a table."""
    table = Table(title="Summary", show_header=False)
    for what, value in summary(report):
        table.add_row(what, value)
    return table


def scores_table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return a table of the scores of tasks with their standard errors, given by column, task and metric."""
    table = Table(title="Tasks")
    for column in ("task", "metric", *columns):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metric, values in scores_of(columns):
        table.add_row(task, metric, *values)
    return table


def speed_table(figures: Iterable[Speed]) -> Table:
    """Return a table of the timings of layers in dense and sparse form."""
    table = Table(title="One layer of each shape")
    for column in ("layer", "outputs x inputs", "zeros", "tokens", "form", "dense ms", "sparse ms", ""):
        justify: JustifyMethod = "left" if column in ("layer", "form", "") else "right"
        table.add_column(column, justify=justify, no_wrap=column.endswith(" ms"))
    for figure in figures:
        table.add_row(
            figure.layer.rsplit(".", 1)[-1],
            f"{figure.shape[0]} x {figure.shape[1]}",
            f"{figure.sparsity:.0%}",
            str(figure.tokens),
            figure.form,
            f"{1e3 * figure.dense:.3f}",
            f"{1e3 * figure.sparse:.3f}",
            figure.verdict,
        )
    return table


def model_speed_table(figures: Iterable[ModelSpeed], sizes: tuple[int, int]) -> Table:
    """Return a table of the speed of two whole models.

    Args:
        figures: speeds of both by task.
        sizes: sizes of the weights in bytes: of the model that is compared with, and of the model itself.
    """
    table = Table(title="Whole models")
    for column in ("", "compared with", "this model", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for figure in figures:
        rates = (f"{figure.dense:,.1f} tokens/s", f"{figure.model:,.1f} tokens/s")
        table.add_row(figure.task, *rates, f"{figure.ratio:.2f} times")
    table.add_row("weights", *map(number_of_bytes, sizes), f"{sizes[1] / sizes[0]:.2f} times")
    return table


def as_text(table: Table) -> str:
    """Return a table as plain text, 100 columns wide."""
    console = Console(file=StringIO(), width=100)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
