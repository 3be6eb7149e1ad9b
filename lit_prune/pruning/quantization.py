"""Quantisation of the kept weights as part of a pruning run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops.linalg import check_damping
from lit_prune.ops.quantization import Integers, round_by_descent

_KINDS: dict[int, Integers] = {8: "int8", 4: "int4"}


@dataclass(frozen=True)
class Quantize:
    """Rounds the kept weights of every layer to 8 or 4 bits after its solver, with the least output error.

    The grids are those of packed models: one scale per row for 8 bits, one per 64 inputs of a row for 4 bits, chosen
    with the squared input norms as weights. From the nearest levels, ``passes`` of coordinate descent on the Gram
    matrix move each weight to the level that is best with all others as they are. The error is that against the dense
    weight, so the descent makes up for what was pruned too, and the layers behind are calibrated on the rounded ones.
    Masks stay as they are. At a sparsity of 0, the model is quantised without pruning.

    The folder holds ordinary weights, whose values are on the grids; ``lit-prune export --to packed`` stores them in 8
    or 4 bits without a further loss.

    .. code-block:: yaml

        quantize: {class_path: Quantize, init_args: {bits: 4}}
    """

    bits: Literal[8, 4] = 4
    """Number of bits per kept weight."""
    passes: int = 4
    """Number of passes of coordinate descent; 0 = round to nearest. A pass costs one and a half products
    ``[o, i] @ [i, i]`` per layer."""
    damping: float = 0.3
    """Increase of the diagonal of the Gram matrix, as a fraction of itself: higher for less calibration data."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if isinstance(self.bits, bool) or self.bits not in _KINDS:
            raise InputError(f"quantize bits is {self.bits!r}: it must be 8 or 4")
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or self.passes < 0:
            raise InputError(f"quantize passes is {self.passes!r}: it must be a whole number, 0 or more, such as 4")
        check_damping(self.damping)

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the floating-point operations of one layer."""
        return 3 * self.passes * outputs * inputs**2

    def round(self, weight: Tensor, keep: Tensor, dense: Tensor, gram: Tensor) -> Tensor:
        """Return the rounded weight ``[o, i]`` in the dtype of ``weight``.

        Args:
            weight: pruned weight ``[o, i]``.
            keep: keep mask ``[o, i]`` bool.
            dense: dense weight ``[o, i]``.
            gram: Gram matrix of the inputs ``[i, i]``.
        """
        return round_by_descent(weight, keep, dense, gram, _KINDS[self.bits], self.passes, self.damping).to(
            weight.dtype
        )
