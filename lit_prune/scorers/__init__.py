"""Layer 1: scorers, the importance of each weight. One file per method; every file in this package is discovered."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lit_prune.discovery import import_all
from lit_prune.scorers.base import Scorer

METHODS: dict[str, type[Scorer]] = import_all(sys.modules[__name__], Scorer)
"""Scorer classes of this package, by class name."""

globals().update(METHODS)
__all__ = ["METHODS", "Scorer", *METHODS]  # noqa: PLE0604

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
