"""Figures of pruned layers, of masks and of spectra, for light and dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, NullLocator

from lit_prune.ops import PackedMask
from lit_prune.ops.spectrum import PowerLaw
from lit_prune.reporting.analysis import Analysis

Points = Sequence[tuple[float, float]]
"""(block, value) pairs of the layers of one kind."""
_INK = "#010203"
"""Colour of text and lines: near black in a PNG, replaced by the text colour of the page in an SVG."""
_COLOURS = ("#3b8bd9", "#e07b39", "#2aa876", "#c44fa0", "#8f7ee7", "#b8a12b", "#4fb3c4", "#d9534f")
"""Colours of curves, readable on white and on black."""
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.prop_cycle": cycler(color=_COLOURS),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # keep text as text, which is smaller and uses the page's font
    "font.family": "sans-serif",
}
_WIDTH = 6.0
"""Width of a figure in inches; its text is readable on a phone, 390 pixels wide."""
_PIXELS = 128
"""Maximum side of a mask's picture, in pixels."""
_DECADES = 100
"""Ratio of the limits of a logarithmic axis above which only powers of ten have ticks."""
_LONGEST = 60
"""Maximum number of characters of a name."""
_LEGEND, _KEY = 72, 8
"""Width of a legend and of the key of one of its entries, in characters."""
_P = ParamSpec("_P")


def _shown(name: str) -> str:
    """Escape a name for Matplotlib: no formulas, drawable characters, and no leading ``_``, which legends skip."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name[:_LONGEST])
    return (" " if text[:1] in ("", "_") else "") + text.replace("$", r"\$")


def _styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(height: float = 3.6, left: float = 0.15, top: float = 0.1) -> Figure:
    """Return a figure with fixed margins; a layout engine would take longer than the drawing.

    Args:
        height: height of the figure in inches.
        left: left margin, as a fraction of the width.
        top: top margin in inches.
    """
    figure = Figure(figsize=(_WIDTH, height))
    figure.subplots_adjust(left=left, right=0.97, bottom=0.5 / height, top=1 - top / height)
    return figure


class _PlainNumbers(LogFormatter):
    """Labels the ticks of a logarithmic axis with 60 and 0.06 instead of 6 x 10^1 and 6e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        # The parent class chooses which ticks have a label.
        return f"{x:.{self._digits()}g}" if super().__call__(x, pos) else ""

    def _digits(self) -> int:
        """Return the number of digits that tell neighbouring ticks apart."""
        axis: Any = self.axis
        low, high = sorted(axis.get_view_interval())
        return 3 if high >= 2 * low else 2 + math.ceil(math.log10(high / (high - low)))


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers; call it after plotting, as the ticks depend on the range."""
    axis.set_major_formatter(_PlainNumbers())
    low, high = axis.get_view_interval()
    if high > _DECADES * low:
        axis.set_minor_locator(NullLocator())  # dozens of minor ticks would take longer to draw than all the rest
    else:
        axis.set_minor_formatter(_PlainNumbers(minor_thresholds=(2, 0.5)))


@_styled
def by_block(
    series: Mapping[str, Points],
    label: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    over: str = "block",
    rings: Points = (),
) -> Figure:
    """Plot values over the blocks, one line per series, with rings around some of the points."""
    figure = _figure()
    axes = figure.add_subplot(xlabel=over, ylabel=label, yscale="log" if log else "linear")
    for name, points in series.items():
        axes.plot([block for block, _ in points], [value for _, value in points], ".-", label=_shown(name))
    if rings:
        axes.plot([block for block, _ in rings], [value for _, value in rings], "o", ms=9, mfc="none", mec=_INK)
    if limits is not None:
        axes.set_ylim(*limits)
    if log:
        _plain_numbers(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, color=_INK)
    _legend(axes, series, most=4)
    return figure


def _legend(axes: Axes, names: Collection[str], most: int) -> None:
    """Add a legend with as many columns as fit the width, at most ``most``."""
    longest = max((min(len(name), _LONGEST) for name in names), default=1)
    axes.legend(ncols=min(most, max(1, _LEGEND // (longest + _KEY))), fontsize="small")


@_styled
def bars(values: Mapping[str, float], label: str) -> Figure:
    """Plot a horizontal bar for each name, the largest value on top."""
    figure = _figure(height=0.8 + 0.35 * len(values), left=0.2)
    axes = figure.add_subplot(xlabel=label)
    ordered = sorted(values.items(), key=lambda item: item[1])
    drawn = axes.barh([_shown(name) for name, _ in ordered], [value for _, value in ordered], color=_COLOURS[0])
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    return figure


@_styled
def scatter(points: Mapping[str, tuple[float, float]], across: str, up: str, log: bool = False) -> Figure:
    """Plot named points, with a logarithmic ``up`` axis, and a logarithmic ``across`` axis if ``log``."""
    figure = _figure()
    axes = figure.add_subplot(xlabel=across, ylabel=up, yscale="log", xscale="log" if log else "linear")
    for name, (x, y) in points.items():
        axes.plot([x], [y], "o", label=_shown(name))
    _plain_numbers(axes.yaxis)
    if log:
        _plain_numbers(axes.xaxis)
    axes.grid(alpha=0.3, color=_INK, which="both")
    _legend(axes, points, most=2)
    return figure


def kind_of(name: str) -> str:
    """Return the last component of a module name, such as ``q_proj``."""
    return name.rsplit(".", 1)[-1]


def analysis_figures(analysis: Analysis) -> dict[str, Figure]:
    """Return every figure of an analysis, by file stem."""
    metric: dict[str, list[tuple[float, float]]] = {}
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


@_styled
def histogram(name: str, values: np.ndarray, tail: PowerLaw) -> Figure:
    """Plot a spectrum's density with the power law fitted to its tail, on logarithmic axes."""
    figure = _figure(top=0.3)
    axes = figure.add_subplot(xlabel="eigenvalue of WᵀW", ylabel="density", xscale="log", yscale="log")
    axes.set_title(_shown(name))
    bins = np.geomspace(values[0], values[-1], 101).tolist()
    axes.hist(values, bins=bins, density=True, alpha=0.6, histtype="stepfilled")  # one polygon instead of 100 bars
    grid = np.geomspace(tail.lambda_min, values[-1], 50)
    law = (tail.alpha - 1) / tail.lambda_min * (grid / tail.lambda_min) ** -tail.alpha
    axes.plot(grid, law * tail.tail / len(values), "--", label=f"alpha {tail.alpha:.2f}, KS {tail.distance:.3f}")
    axes.axvline(tail.lambda_min, color="grey", linewidth=0.8)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.legend(loc="upper right")
    return figure


@_styled
def mask_pictures(masks: Mapping[str, PackedMask], most: int = 8) -> Figure:
    """Draw keep masks: the colour of a pixel is the fraction of its weights that are kept, with a colour bar below."""
    chosen = dict(islice(masks.items(), most))
    columns = min(4, len(chosen))
    width, height = _WIDTH / max(columns, 1), 1.8 * -(-len(chosen) // max(columns, 1)) + 0.8
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))  # in inches, and for all pictures: axes take longer to make than to draw
    axes.set_axis_off()
    drawn = None
    for place, (name, mask) in enumerate(chosen.items()):
        kept = density(mask)
        left, top = place % columns * width, place // columns * 1.8 + 0.25
        inch = max(kept.shape[0] / 1.45, kept.shape[1] / (0.94 * width))  # pixels
        right, bottom = left + kept.shape[1] / inch, top + kept.shape[0] / inch
        shift = (left + width - right) / 2
        extent = (left + shift, right + shift, bottom, top)
        drawn = axes.imshow(kept, "Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto", extent=extent)
        title = f"{_shown(kind_of(name))} {mask.shape[-2]} x {mask.shape[-1]}"
        axes.text(left + width / 2, top - 0.06, title, fontsize="small", ha="center")
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    if drawn:
        cax = figure.add_axes((0.2, 0.45 / height, 0.6, 0.1 / height))
        key = figure.colorbar(drawn, cax, orientation="horizontal", label="fraction of weights kept")
        key.outline.set_visible(False)
    return figure


def density(mask: PackedMask) -> np.ndarray:
    """Return the fraction of kept weights in each cell of a grid of at most 128 x 128 cells, ``[rows, columns]``."""
    keep = mask.unpack().cpu().numpy()
    keep = keep.reshape(-1, keep.shape[-1])
    starts = [np.arange(cells) * size // cells for size in keep.shape for cells in [min(_PIXELS, size)]]
    rows, columns = (np.diff(start, append=size) for start, size in zip(starts, keep.shape, strict=True))
    kept = np.add.reduceat(np.add.reduceat(keep, starts[0], axis=0, dtype=np.float64), starts[1], axis=1)
    return kept / np.outer(rows, columns)


def as_png(figure: Figure) -> bytes:
    """Return the figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_svg(figure: Figure) -> Markup:
    """Return the figure as an SVG element whose lines and text have the text colour of the surrounding page."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(_INK, "currentColor"))
