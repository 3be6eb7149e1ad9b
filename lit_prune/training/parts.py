"""Split of one text into training, validation and test parts: eight tenths, one tenth and one tenth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

Split = Literal["train", "validation", "test"]

_MARKS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
"""Start and end of each part, in tenths of the characters."""
NAMES = {"train": "first eight tenths", "validation": "ninth tenth", "test": "last tenth"}
"""Display names of the parts."""
_SLACK = 50
"""Divisor of the text length for the maximum shift of a cut: a part may start up to 1/50 of the text before its mark,
at the start of a document, paragraph, line or word."""


def part_of(documents: Sequence[str], split: Split) -> list[str]:
    """Return the documents of one split of a text; the first and last document may be cut.

    The parts are consecutive, disjoint, and together are the whole text. Example: of ten documents of equal length, the
    first eight are for training, the ninth for validation, and the last for the test.

    Args:
        documents: documents of the text.
        split: split to return.
    """
    ends = list(accumulate(map(len, documents)))
    start, stop = (_cut(documents, ends, tenths) for tenths in _MARKS[split])
    offsets = [end - len(document) for end, document in zip(ends, documents, strict=True)]
    cut = [
        document[max(start - offset, 0) : stop - offset]
        for document, offset in zip(documents, offsets, strict=True)
        if offset < stop
    ]
    return [document for document in cut if document]


def _cut(documents: Sequence[str], ends: Sequence[int], tenths: int) -> int:
    """Return the index of the character at which a part starts: the last boundary shortly before ``tenths`` tenths."""
    total = ends[-1]
    mark = total * tenths // 10
    if tenths in (0, 10):
        return mark
    earliest = mark - total // _SLACK
    if boundaries := [end for end in ends if earliest <= end <= mark]:
        return boundaries[-1]
    index = next(index for index, end in enumerate(ends) if end > mark)
    document, offset = documents[index], ends[index] - len(documents[index])
    for separator in ("\n\n", "\n", " "):
        place = document.rfind(separator, max(earliest - offset, 0), mark - offset)
        if place >= 0:
            return offset + place + len(separator)
    return mark
