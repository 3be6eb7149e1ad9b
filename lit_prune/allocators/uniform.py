"""The same sparsity for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lit_prune.allocators.base import Allocator, Layer


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """Every layer gets the target sparsity, as in the SparseGPT and Wanda papers.

    .. code-block:: yaml

        allocator: {class_path: Uniform}
    """

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return ``target`` for every layer."""
        return {layer.name: target for layer in layers}
