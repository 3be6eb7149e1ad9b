"""Layer 1: allocators, the sparsity of each layer. One file per method; every file in this package is discovered."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lit_prune.allocators.base import Allocator
from lit_prune.discovery import import_all

METHODS: dict[str, type[Allocator]] = import_all(sys.modules[__name__], Allocator)
"""Allocator classes of this package, by class name."""

globals().update(METHODS)
__all__ = ["METHODS", "Allocator", *METHODS]  # noqa: PLE0604

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
