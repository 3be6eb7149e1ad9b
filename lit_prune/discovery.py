"""Discovery of the methods of a package.

A new scorer, allocator or solver is one new file. ``import_all`` imports its class, which makes it available to the
command line and to the contract tests.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType


def import_all(package: ModuleType, base: type) -> dict[str, type]:
    """Import every module of ``package`` and return its concrete subclasses of ``base``, by class name."""
    for module in pkgutil.iter_modules(package.__path__, prefix=package.__name__ + "."):
        importlib.import_module(module.name)
    return {cls.__name__: cls for cls in sorted(_subclasses(base), key=lambda c: c.__name__) if _belongs(cls, package)}


def _subclasses(base: type) -> set[type]:
    found: set[type] = set(base.__subclasses__())
    return found.union(*(_subclasses(cls) for cls in found))


def _belongs(cls: type, package: ModuleType) -> bool:
    return cls.__module__.startswith(package.__name__ + ".") and not inspect.isabstract(cls)
