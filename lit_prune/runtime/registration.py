"""Registration of the plug-in for transformers, without importing transformers before anybody needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register the plug-in now if transformers has its registry of quantizers, else as soon as it has one."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    import_module("lit_prune.runtime.plugin")


class _WhenImported(MetaPathFinder):
    """Registers the plug-in once the registry has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the registry as usual, and let its loader call ``_register`` at the end; leave other modules alone."""
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        loader.exec_module = exec_module
        return spec
