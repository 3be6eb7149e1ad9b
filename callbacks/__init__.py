"""Layer 4: Lightning callbacks. Hooks and state, no maths."""

from lit_prune.callbacks.export import Export
from lit_prune.callbacks.keep_masks import KeepMasks
from lit_prune.callbacks.prune import Prune

__all__ = ["Export", "KeepMasks", "Prune"]
