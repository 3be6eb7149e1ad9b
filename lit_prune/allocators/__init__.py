"""Layer 1: how much of each layer goes. One file per method; every file here is imported, and its class offered."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lit_prune.allocators.base import Allocator
from lit_prune.discovery import import_all

METHODS: dict[str, type[Allocator]] = import_all(sys.modules[__name__], Allocator)
"""Every method of this package, by class name."""

globals().update(METHODS)
__all__ = ["METHODS", "Allocator", *METHODS]  # noqa: PLE0604

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
