"""Structured sparsity: whole units of a model, such as the channels of an MLP, in place of single weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final, get_args

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops.masks import Pattern, check_sparsity, drop_smallest

BlockScore = Literal["output_error", "cosine"]
Unit = Literal["channels", "heads", "blocks"]
"""Kind of unit: channels of an MLP, key-value heads with all queries that read them, or decoder blocks."""


@final
@dataclass(frozen=True)
class Structured(Pattern):
    """Whole units are removed, so that the model becomes smaller, and faster without special kernels.

    A unit is a channel of an MLP (a row of gate and up projection and a column of the down projection), a key-value
    head with the query heads that read it (rows of the query, key and value projection and columns of the output
    projection), or a decoder block. The units to remove are chosen, and the kept weights repaired, in the layer that
    reads them: a unit's score is the sum of the scores of its columns. On a single weight, without a model, every
    column is a unit.

    .. code-block:: yaml

        pattern: {class_path: Structured, init_args: {sparsity: 0.25, units: [channels]}}
    """

    sparsity: float
    """Fraction to remove of the weights of all layers with such units, in [0, 1)."""
    units: Sequence[Unit] | Unit = ("channels",)
    """Kinds of units to remove: channels, heads, blocks. Blocks with other units need the allocator Measured."""
    round_to: int = 1
    """Number that the number of channels kept in a layer is a multiple of, such as 8 or 64."""
    block_score: BlockScore = "output_error"
    """Score of a block: the error of the last block's outputs without it (``output_error``), or one minus the cosine of
    its input and output (``cosine``), as in ShortGPT. Scorer and solver of the plan are not used for blocks."""
    columns: Tensor | None = field(init=False, default=None, repr=False, compare=False)
    """Columns of the units of one layer, ``[units, columns per unit]`` int64; None = every column is a unit."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        object.__setattr__(self, "units", (self.units,) if isinstance(self.units, str) else tuple(self.units))
        for unit in self.units:
            if unit not in get_args(Unit):
                raise InputError(f"units has {unit!r}: they are of {', '.join(get_args(Unit))}")
        if not self.units or len(set(self.units)) < len(self.units):
            raise InputError(f"units is {list(self.units)}: name one or more of {', '.join(get_args(Unit))}, each once")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise InputError(f"round_to is {self.round_to!r}: it must be a whole number of at least 1, such as 64")
        if self.block_score not in get_args(BlockScore):
            raise InputError(
                f"block_score is {self.block_score!r}: it must be one of {', '.join(get_args(BlockScore))}"
            )

    def at(self, sparsity: float) -> Structured:
        """Return a copy at another sparsity, with the same units."""
        return self._copy(sparsity, self.columns)

    def only(self, unit: Unit) -> Structured:
        """Return a copy that removes units of a single kind."""
        return replace(self, units=(unit,))

    def of_layer(self, columns: Tensor, removed: int) -> Structured:
        """Return the pattern of one layer.

        Args:
            columns: columns of the layer's units, ``[units, columns per unit]`` int64.
            removed: number of units to remove.
        """
        return self._copy(removed / len(columns), columns)

    def _copy(self, sparsity: float, columns: Tensor | None) -> Structured:
        copy = replace(self, sparsity=sparsity)
        object.__setattr__(copy, "columns", columns)
        return copy

    def check(self, shape: tuple[int, int] | torch.Size, layer: str = "the layer") -> None:
        """Accept every shape."""

    def columns_of(self, shape: Sequence[int]) -> Tensor:
        """Return the columns of the units of a weight ``[o, i]``, ``[units, columns per unit]`` int64."""
        return torch.arange(shape[1]).unsqueeze(1) if self.columns is None else self.columns

    def removed(self, units: int) -> int:
        """Return the number of units to remove out of ``units``."""
        return round(self.sparsity * units)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the keep mask ``[o, i]`` of the units with the largest sums of ``scores`` ``[o, i]``.

        Example: with two units of one column each, the scores ``[[1, 2], [4, 0]]`` sum to 5 and 2, so that at 50 % the
        second column is removed.
        """
        columns = self.columns_of(scores.shape).to(scores.device)
        sums = scores.sum(0)[columns].sum(1, keepdim=True).T
        return self.mask_of(drop_smallest(sums, self.removed(len(columns)))[0], scores.shape)

    def mask_of(self, kept: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the keep mask of a weight of a shape ``[o, i]`` that keeps the units ``kept`` ``[units]`` (bool)."""
        columns = self.columns_of(shape).to(kept.device)
        keep = torch.zeros(shape[1], dtype=torch.bool, device=kept.device)
        keep[columns[kept].flatten()] = True
        return keep.expand(*shape).clone()
