"""lit-prune: prune large language models, keep the masks, recover the accuracy.

Public names are imported lazily, so that ``import lit_prune.ops`` needs only torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_prune.runtime.registration import register

if TYPE_CHECKING:
    from lit_prune.models.load import load_model as load_model
    from lit_prune.ops import NM as NM
    from lit_prune.ops import LayerStats as LayerStats
    from lit_prune.ops import Structured as Structured
    from lit_prune.ops import Unstructured as Unstructured
    from lit_prune.pruning import PruningPlan as PruningPlan
    from lit_prune.pruning import PruningReport as PruningReport
    from lit_prune.pruning import prune as prune

__version__ = "0.1.0"

_HOMES = {
    "NM": "lit_prune.ops",
    "LayerStats": "lit_prune.ops",
    "Structured": "lit_prune.ops",
    "Unstructured": "lit_prune.ops",
    "PruningPlan": "lit_prune.pruning",
    "PruningReport": "lit_prune.pruning",
    "load_model": "lit_prune.models.load",
    "prune": "lit_prune.pruning",
}

__all__ = [
    "NM",
    "LayerStats",
    "PruningPlan",
    "PruningReport",
    "Structured",
    "Unstructured",
    "__version__",
    "load_model",
    "prune",
]


register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_prune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
