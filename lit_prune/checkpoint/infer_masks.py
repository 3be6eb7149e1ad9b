"""Keep masks inferred from the zeros of a model, if no saved masks are available."""

from __future__ import annotations

from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import find_targets
from lit_prune.ops import PackedMask
from lit_prune.sharding.parameters import full_tensor_of


def masks_of_zeros(model: nn.Module) -> dict[str, PackedMask]:
    """Return keep masks by parameter name that prune the exact zeros in the linear layers of the decoder blocks.

    A weight that is zero by chance is treated as pruned; prefer saved masks, which do not have this ambiguity.

    Raises:
        InputError: if no weight is zero.
    """
    masks = {}
    for target in find_targets(model, find_blocks(model)):
        keep = full_tensor_of(target.module.get_parameter("weight")) != 0
        if not keep.all():
            masks[target.parameter] = PackedMask.pack(keep)
    if not masks:
        raise InputError("masks are asked of zeros: no weight of the model is zero, so it is not pruned")
    return masks
