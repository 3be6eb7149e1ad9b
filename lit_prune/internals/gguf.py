"""Private names of gguf."""

from __future__ import annotations

from typing import Any

from gguf import GGUFReader


class BoundedReader(GGUFReader):
    """A reader that refuses to read past the end of a file, where gguf itself goes on with empty values."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
        found = super()._get(offset, dtype, count, *args, **options)
        if len(found) < count:
            raise ValueError(f"it ends within a value at byte {offset:,}")
        return found
