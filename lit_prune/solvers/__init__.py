"""Layer 1: choose the mask and repair the weights that stay. One file per method; every file beside this one is imported and its class offered here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lit_prune.solvers.base import Solver
from lit_prune.introspection import import_all

METHODS: dict[str, type[Solver]] = import_all(sys.modules[__name__], Solver)
"""Every method of this package, by class name."""

globals().update(METHODS)
__all__ = ["METHODS", "Solver", *METHODS]  # noqa: PLE0604

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
