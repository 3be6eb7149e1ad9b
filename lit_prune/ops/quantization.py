"""Weights on grids of 8 and 4 bits: scales, rounding to nearest, and rounding that minimises the output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.ops.precision import working

Integers = Literal["int8", "int4"]
"""Grid of a weight: multiples of a scale, which belongs to a row (int8) or to 64 inputs of a row (int4)."""
CHUNK = 64
"""Number of inputs that share a scale of 4-bit values."""
_LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}
_TRIED = {"int8": (1.0,), "int4": (8 / 7, 15 / 14, *torch.linspace(1.0, 0.65, 8).tolist())}
"""Tried scales, as multiples of the one that puts the largest value of a group on the lowest level: with 4 bits, from
the one that puts it on the next level to one that clips a third of it."""
_LARGEST = 64
"""Number of values of a group, the largest ones, by which the step of a grid that they are on is recognised."""


@dataclass(frozen=True)
class Grid:
    """The grid of a weight ``[o, i]``: integers times scales, whose sign puts the largest value on the lowest level.

    Example: of the 4-bit levels from -8 to 7, the values (4, 1, -3) use -8, -2 and 6 with the scale -0.5; with scales
    above zero only, the best is 4/7, which rounds them to 4, 1.14 and -2.86.
    """

    kind: Integers
    """Number of bits."""
    scales: Tensor
    """Scales, bfloat16 ``[o, groups]``: one group, or one for every 64 inputs."""

    @classmethod
    def of(cls, weight: Tensor, kind: Integers, importance: Tensor | None = None) -> Grid:
        """Return the grid with the least squared rounding error, among some for every group.

        A weight that is on a grid already, up to the precision of bfloat16, gets that grid again.

        Args:
            weight: ``[o, i]``, zero where it is pruned.
            kind: number of bits.
            importance: factors ``[i]`` of the squared errors, such as the diagonal of a Gram matrix; None = all 1.
        """
        weight = working(weight)
        groups = _grouped(weight, kind)
        factors = None if importance is None else _grouped(importance.to(weight).expand(len(weight), -1), kind)
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        best = torch.zeros_like(extreme)
        least = torch.full_like(extreme, torch.inf)
        tried = [extreme / _LEVELS[kind][0] * factor for factor in _TRIED[kind]]
        for scale in (_step(groups, extreme, kind), *tried):
            stored = scale.bfloat16().to(weight)
            error = (_levels(groups, stored, kind) * stored).sub_(groups).square_()
            error = (error if factors is None else error.mul_(factors)).sum(-1, keepdim=True)
            best, least = torch.where(error < least, stored, best), torch.minimum(error, least)
        return cls(kind, best.squeeze(-1).bfloat16())

    def levels(self, weight: Tensor) -> Tensor:
        """Return the nearest integers of a weight ``[o, i]``, as floats."""
        scales = self.scales.to(weight).unsqueeze(-1)
        rounded = _levels(_grouped(weight, self.kind), scales, self.kind)
        return rounded.reshape(len(weight), -1)[:, : weight.shape[1]]

    def steps(self, inputs: int) -> Tensor:
        """Return the scale of every weight, ``[o, i]`` float32."""
        return self.scales.float().repeat_interleave(inputs if self.kind == "int8" else CHUNK, 1)[:, :inputs]


def round_by_descent(
    weight: Tensor, keep: Tensor, target: Tensor, gram: Tensor, kind: Integers, passes: int, damping: float = 0.0
) -> Tensor:
    """Round a sparse weight to a grid so that its outputs stay close to those of the dense weight.

    Minimises ``(W' - W) G (W' - W)ᵀ`` over the weights W' on the grid with the given mask, by coordinate descent from
    the nearest ones: column by column, each kept weight becomes the level nearest to its best value with all others as
    they are, ``w'_j - ((W' - W) G)_j / G_jj``. No step increases the error, which is that of the mask as well, so a
    weight that no solver has repaired gets a lower error than it had. Damping keeps the weights closer to the dense
    ones, because a small calibration set does not tell all inputs apart.

    Example: the weight (2.4, 2.4) and inputs that are always equal, ``G = ((1, 1), (1, 1))``, on whole numbers:
    rounded to nearest, the outputs are 4 in place of 4.8. Descent sets the first weight to the level nearest to
    2 + 0.8: (3, 2), and the error falls from 0.64 to 0.04.

    Args:
        weight: pruned weight ``[o, i]``.
        keep: keep mask ``[o, i]`` bool.
        target: dense weight ``W`` ``[o, i]``.
        gram: Gram matrix ``G`` ``[i, i]``.
        kind: number of bits.
        passes: number of passes over all columns; each costs one and a half products ``[o, i] @ [i, i]``.
        damping: by how much the diagonal of G is increased, as a fraction of itself.

    Returns:
        ``[o, i]`` float32 or float64, on the grid.
    """
    start, target = working(weight), working(target)
    inputs = start.shape[1]
    gram = gram.to(start, copy=True)
    gram.diagonal().mul_(1 + damping)
    grid = Grid.of(start, kind, gram.diagonal())
    scales = grid.steps(inputs).to(start).T.contiguous()  # [i, o], like all below: columns are contiguous
    levels = grid.levels(start).T.contiguous()
    kept, dense = keep.T.contiguous(), target.T.contiguous()
    curvature = gram.diagonal().tolist()
    lowest, highest = _LEVELS[kind]
    rounded = levels.mul_(scales)
    for _ in range(passes):
        slope = gram @ (rounded - dense)
        for first in range(0, inputs, CHUNK):
            columns = slice(first, min(first + CHUNK, inputs))
            before = rounded[columns].clone()
            for j in range(columns.start, columns.stop):
                if curvature[j] == 0:
                    continue  # an input that was always zero
                best = torch.add(rounded[j], slope[j], alpha=-1 / curvature[j]).div_(scales[j]).nan_to_num_(0.0)
                new = best.round_().clamp_(lowest, highest).mul_(scales[j]).mul_(kept[j])
                slope[j + 1 : columns.stop].addr_(gram[j, j + 1 : columns.stop], new - rounded[j])
                rounded[j] = new
            slope[columns.stop :].addmm_(gram[columns.stop :, columns], rounded[columns] - before)
    return rounded.T.contiguous()


def _grouped(weight: Tensor, kind: Integers) -> Tensor:
    """Return a weight ``[o, i]`` as ``[o, groups, n]``, padded with zeros."""
    if kind == "int8":
        return weight.unsqueeze(1)
    return pad(weight, (0, -weight.shape[1] % CHUNK)).reshape(len(weight), -1, CHUNK)


def _levels(groups: Tensor, scales: Tensor, kind: Integers) -> Tensor:
    return (groups / scales).nan_to_num_(0.0).round_().clamp_(*_LEVELS[kind])


def _step(groups: Tensor, extreme: Tensor, kind: Integers) -> Tensor:
    """Return the scales of the grids that the groups ``[o, g, n]`` are on; of other groups, some grid that is close.

    The largest value is some whole number of steps; the one is searched that makes the other large values whole too.
    """
    lowest = _LEVELS[kind][0]
    large = groups.gather(-1, groups.abs().topk(min(_LARGEST, groups.shape[-1]), -1).indices)
    best, least = extreme / lowest, torch.full_like(extreme, torch.inf)
    for level in range(-1, lowest - 1, -1):
        scale = (extreme / level).bfloat16().to(groups)
        error = (_levels(large, scale, kind) * scale).sub_(large).square_().sum(-1, keepdim=True)
        best, least = torch.where(error <= least, scale, best), torch.minimum(error, least)  # of equals, the finest
    whole = _levels(groups, best, kind)
    # The mean over all values undoes the rounding of a model in bfloat16.
    return (whole * groups).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True)
