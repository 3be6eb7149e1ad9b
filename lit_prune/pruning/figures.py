"""Figures of pruned layers and of spectra."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lit_prune.ops.spectrum import PowerLaw
from lit_prune.pruning.analysis import Analysis

Points = Sequence[tuple[int, float]]
"""(block, value) of the layers of one kind."""


def by_block(
    series: Mapping[str, Points],
    label: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    over: str = "block",
) -> Figure:
    """Plot values over the blocks, a line per series."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=over, ylabel=label, yscale="log" if log else "linear")
    for name, points in series.items():
        axes.plot([block for block, _ in points], [value for _, value in points], ".-", label=name)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.grid(alpha=0.3)
    axes.legend(ncols=4, fontsize="small")
    return figure


def kind_of(name: str) -> str:
    """Return the last part of a module's name, such as ``q_proj``."""
    return name.rsplit(".", 1)[-1]


def analysis_figures(analysis: Analysis) -> dict[str, Figure]:
    """Return every figure of an analysis, by file stem."""
    metric: dict[str, list[tuple[int, float]]] = {}
    for layer in analysis.layers:
        metric.setdefault(kind_of(layer.name), []).append((layer.block, layer.metrics[analysis.metric]))
    allocation = {
        f"{target:.0%}": [(layer.block, sparsity[layer.name]) for layer in analysis.layers]
        for target, sparsity in analysis.allocations.items()
    }
    tails = {layer.name: layer.tail for layer in analysis.layers}
    return {
        "metric_by_block": by_block(metric, analysis.metric),
        "allocation": by_block(allocation, "sparsity", limits=(0, 1)),
        **{f"esd_{name}": histogram(name, values.numpy(), tails[name]) for name, values in analysis.spectra.items()},
    }


def histogram(name: str, values: np.ndarray, tail: PowerLaw) -> Figure:
    """Plot a spectrum's density with the power law that was fitted to its tail, both axes logarithmic."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="eigenvalue of WᵀW", ylabel="density", xscale="log", yscale="log", title=name)
    axes.hist(values, bins=np.geomspace(values[0], values[-1], 101).tolist(), density=True, color="tab:blue", alpha=0.6)
    grid = np.geomspace(tail.lambda_min, values[-1], 50)
    law = (tail.alpha - 1) / tail.lambda_min * (grid / tail.lambda_min) ** -tail.alpha
    axes.plot(grid, law * tail.tail / len(values), "r--", label=f"alpha {tail.alpha:.2f}, KS {tail.distance:.3f}")
    axes.axvline(tail.lambda_min, color="grey", linewidth=0.8)
    axes.legend()
    return figure


def as_png(figure: Figure) -> bytes:
    """Return the figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
