"""Figures drawn once in a process for each set of labels: half of the time of a small run is the drawing of a dozen.

The tests of the figures themselves, in ``tests/reporting``, draw all of theirs.
"""

from io import BytesIO, StringIO
from typing import Any

from matplotlib.figure import Figure

savefig = Figure.savefig
_drawn: dict[Any, Any] = {}


def _save_once(figure: Figure, buffer: BytesIO | StringIO, **options: Any) -> None:
    labels = [
        (axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *axes.get_legend_handles_labels()[1])
        for axes in figure.axes
    ]
    key = options["format"], *labels
    if key not in _drawn:
        savefig(figure, buffer, **options)
        _drawn[key] = buffer.getvalue()
    else:
        buffer.write(_drawn[key])


Figure.savefig = _save_once  # type: ignore[method-assign]
