"""Parts of a text that serves for training, validation and test alike: eight tenths, one tenth and one tenth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

Split = Literal["train", "validation", "test"]

_MARKS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
"""In tenths of the characters."""
NAMES = {"train": "first eight tenths", "validation": "ninth tenth", "test": "last tenth"}
"""Of the parts, for people."""
_SLACK = 50
"""A part may begin this share of the text (1/50) before its mark, to begin with a document, paragraph, line or word."""


def part_of(documents: Sequence[str], split: Split) -> list[str]:
    """Return the part of a text that serves as a split: documents, the first and last of them cut if need be.

    The parts follow one another, share no character, and together are the whole text. Worked: of ten documents of one
    length the first eight are for training, the ninth for validation, and the last for the test.

    Args:
        documents: the text.
        split: the purpose.
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
    """Return the character at which a part begins: the last good place a little before so many tenths of the text."""
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
