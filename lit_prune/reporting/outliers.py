"""Layers whose output error is an outlier."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from lit_prune.reporting.figures import kind_of
from lit_prune.reporting.report import LayerReport

_LIMIT = 3.5
"""Threshold of the modified z-score (Iglewicz and Hoaglin, 1993)."""
_LEAST_RATIO = 2.0
"""Minimum ratio to the median, because among nearly equal errors any difference would be many deviations."""
_FEWEST = 5
"""Minimum number of layers of a kind; the median of fewer is not meaningful."""


class Outlier(NamedTuple):
    """A layer whose output error is far above the errors of other layers of its kind."""

    layer: LayerReport
    """Report of the layer."""
    ratio: float
    """Error of the layer, as a multiple of the median error of its kind."""


def outliers(layers: Iterable[LayerReport]) -> list[Outlier]:
    """Return the layers whose error is an outlier among layers of their kind, the largest ratio first.

    An error is an outlier if the modified z-score of its logarithm, ``0.6745 (x - median) / MAD``, is above 3.5, and
    the error is at least twice the median. Example: errors 1, 2, 4, 8, 1024 have the base-2 logarithms 0, 1, 2, 3, 10:
    median 2, deviations 2, 1, 0, 1, 8 with median (MAD) 1; 1024 scores 0.6745 x 8 = 5.4 and is 256 times the median, 8
    scores 0.67.
    """
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if layer.output_error and math.isfinite(layer.output_error):
            kinds.setdefault(kind_of(layer.name), []).append(layer)
    found = [outlier for kind in kinds.values() if len(kind) >= _FEWEST for outlier in _of_kind(kind)]
    return sorted(found, key=lambda outlier: -outlier.ratio)


def _of_kind(layers: list[LayerReport]) -> list[Outlier]:
    logs = [math.log(layer.output_error or math.nan) for layer in layers]
    middle = median(logs)
    spread = median(abs(value - middle) for value in logs)
    return [
        Outlier(layer, math.exp(value - middle))
        for layer, value in zip(layers, logs, strict=True)
        if value - middle >= math.log(_LEAST_RATIO) and 0.6745 * (value - middle) > _LIMIT * spread
    ]
