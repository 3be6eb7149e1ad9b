"""Private names of gguf, which is not installed everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_gguf(file: Path) -> Any:
    """Return a ``GGUFReader`` that refuses to read past the end of a file; gguf itself goes on with empty values."""
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
            found = super()._get(offset, dtype, count, *args, **options)
            if len(found) < count:
                raise ValueError(f"it ends within a value at byte {offset:,}")
            return found

    return BoundedReader(file)
