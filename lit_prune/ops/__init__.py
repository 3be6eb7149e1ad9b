"""Layer 1: pure tensor maths. Imports torch and other ops files only."""

from lit_prune.ops.masks import NM, PackedMask, Pattern, Unstructured, select
from lit_prune.ops.stats import LayerStats
from lit_prune.ops.structured import Structured

__all__ = ["NM", "LayerStats", "PackedMask", "Pattern", "Structured", "Unstructured", "select"]
