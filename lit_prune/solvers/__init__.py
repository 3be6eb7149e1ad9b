"""Layer 1: choose the mask, repair the rest. One file per method; every file here is imported, its class offered."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lit_prune.discovery import import_all
from lit_prune.solvers.base import Solver

METHODS: dict[str, type[Solver]] = import_all(sys.modules[__name__], Solver)
"""Every method of this package, by class name."""

globals().update(METHODS)
__all__ = ["METHODS", "Solver", *METHODS]  # noqa: PLE0604

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
