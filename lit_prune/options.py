"""Options that accept one value or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value", str, int, float)


def as_list(value: Sequence[Value] | Value) -> list[Value]:
    """Return the values of an option as a list; a single value becomes a list of one."""
    return [value] if isinstance(value, (str, int, float)) else list(value)
