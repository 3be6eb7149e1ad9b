"""Layer 1: how much each weight matters. One file per method; every file beside this one is imported and its class offered here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lit_prune.scorers.base import Scorer
from lit_prune.introspection import import_all

METHODS: dict[str, type[Scorer]] = import_all(sys.modules[__name__], Scorer)
"""Every method of this package, by class name."""

globals().update(METHODS)
__all__ = ["METHODS", "Scorer", *METHODS]  # noqa: PLE0604

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
