"""Sparsity patterns and the keep masks that they select. In every mask, True = kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lit_prune.errors import InputError

Group = Literal["row", "matrix"]


class Pattern(ABC):
    """Base class of sparsity patterns: the permitted positions and the number of zeros in a weight ``[o, i]``."""

    sparsity: float
    """Fraction of the weights that the pattern removes, in [0, 1)."""

    @abstractmethod
    def at(self, sparsity: float) -> Pattern:
        """Return a pattern of the same kind at another sparsity (for N:M, the nearest N)."""

    @abstractmethod
    def check(self, shape: tuple[int, int] | torch.Size, layer: str = "the layer") -> None:
        """Raise ``InputError`` if the pattern is not applicable to a weight of this shape."""

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Return the keep mask ``[o, i]`` (bool) of the largest scores ``[o, i]``; counts are exact."""

    def grouped(self, default: Group) -> Pattern:
        """Return the pattern with ``default`` as the comparison group, unless the user named one."""
        return self


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return ``sparsity`` as a float, or raise ``InputError`` if it is not in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise InputError(f"{name} is {sparsity!r}: it must be a number in [0, 1), such as 0.5 for half of the weights")
    return float(sparsity)


@final
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Unstructured sparsity: exactly ``round(sparsity * o * i)`` zeros anywhere in a weight ``[o, i]``.

    With ``group: row``, the counts of the rows sum to this number and differ by at most one: the rows whose next score
    is smallest lose one weight more than the others.

    .. code-block:: yaml

        pattern: {class_path: Unstructured, init_args: {sparsity: 0.6, group: row}}
    """

    sparsity: float
    """Fraction of the weights to remove, in [0, 1)."""
    group: Group | None = None
    """Comparison group: the weights of one output (``row``), or of the whole ``matrix``; null = the method's default:
    rows for Wanda and GBLM, the matrix for the others."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        if self.group not in (None, "row", "matrix"):
            raise InputError(f"group is {self.group!r}: it must be 'row', 'matrix' or null")

    def at(self, sparsity: float) -> Unstructured:
        """Return a copy at another sparsity, with the same group."""
        return Unstructured(sparsity, self.group)

    def grouped(self, default: Group) -> Unstructured:
        """Return a copy with ``default`` as the group if ``group`` is None."""
        return Unstructured(self.sparsity, self.group or default)

    def check(self, shape: tuple[int, int] | torch.Size, layer: str = "the layer") -> None:
        """Accept every shape."""

    def mask(self, scores: Tensor) -> Tensor:
        """Return the keep mask by rank, not by a threshold, so that ties do not change the count."""
        if self.group != "row":
            return drop_smallest(scores.reshape(1, -1), round(self.sparsity * scores.numel())).reshape(scores.shape)
        fewest, more = divmod(round(self.sparsity * scores.numel()), len(scores))
        counts = torch.full((len(scores),), fewest)
        if more:
            counts[_kth_smallest(scores, fewest + 1).squeeze(1).argsort(stable=True)[:more].cpu()] += 1
        return drop_smallest_each(scores, counts)


@final
@dataclass(frozen=True)
class NM(Pattern):
    """At most ``keep`` nonzeros in every ``of`` consecutive inputs of a row: ``NM(2, 4)`` is "2:4".

    .. code-block:: yaml

        pattern: {class_path: NM, init_args: {keep: 2, of: 4}}
    """

    keep: int
    """Number of weights to keep in each run, from 1 to ``of``."""
    of: int
    """Length of a run of consecutive inputs; must divide the layer's number of inputs."""
    sparsity: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not all(isinstance(value, int) for value in (self.keep, self.of)) or not 1 <= self.keep <= self.of:
            raise InputError(
                f"N:M is {self.keep}:{self.of}: N (weights kept) must be a whole number from 1 to M, such as 2:4"
            )
        object.__setattr__(self, "sparsity", 1 - self.keep / self.of)

    def at(self, sparsity: float) -> NM:
        """Return the pattern with the same M and the nearest sparsity, keeping at least one weight per run."""
        return NM(max(1, round((1 - check_sparsity(sparsity)) * self.of)), self.of)

    def check(self, shape: tuple[int, int] | torch.Size, layer: str = "the layer") -> None:
        """Raise ``InputError`` if M does not divide the number of inputs."""
        if shape[1] % self.of:
            raise InputError(
                f"{self.keep}:{self.of} needs inputs divisible by {self.of}, and {layer} has {shape[1]}: "
                "exclude it, or use an unstructured pattern"
            )

    def mask(self, scores: Tensor) -> Tensor:
        """Return the keep mask of the ``keep`` largest scores in every run."""
        self.check(scores.shape)
        runs = scores.reshape(-1, self.of)
        return drop_smallest(runs, self.of - self.keep).reshape(scores.shape)


def drop_smallest(groups: Tensor, count: int) -> Tensor:
    """Return the keep mask of ``groups`` ``[g, n]`` that drops exactly the ``count`` smallest of each group."""
    if not count:
        return torch.ones_like(groups, dtype=torch.bool)
    largest_dropped = _kth_smallest(groups, count)
    keep = (groups <= largest_dropped).logical_not_()  # NaN is kept, so that the solver detects it
    missing = groups.shape[1] - count - keep.sum(1, keepdim=True)
    # Among ties with it, keep the last ones. On a GPU the host would wait to learn whether there are any, and it would
    # do so in SparseGPT's sweep for every few columns.
    if groups.device.type != "cpu" or missing.any():
        ties = groups == largest_dropped
        keep |= ties & (ties.sum(1, keepdim=True) - ties.cumsum(1) < missing)
    return keep


def _kth_smallest(groups: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value ``[g, 1]`` of each group ``[g, n]``, by partition."""
    groups = groups.detach()
    if groups.device.type != "cpu":
        return groups.topk(k, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    # NumPy's partition is ten times as fast as torch's topk and kthvalue, but does not support bfloat16.
    values = groups if groups.dtype in (torch.float32, torch.float64) else groups.float()
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k]).to(groups.dtype)


def drop_smallest_each(groups: Tensor, counts: Tensor) -> Tensor:
    """Return the keep mask of ``groups`` ``[g, n]`` that drops the ``counts`` ``[g]`` smallest of each group.

    If the counts differ by more than one, all groups are sorted, which is slower.
    """
    fewest, most = int(counts.min()), int(counts.max())
    if fewest == most:
        return drop_smallest(groups, fewest)
    counts = counts.to(groups.device)
    if most == fewest + 1:
        keep = torch.empty_like(groups, dtype=torch.bool)
        for count in (fewest, most):
            those = counts == count
            keep[those] = drop_smallest(groups[those], count)
        return keep
    order = groups.argsort(1)
    kept = torch.arange(groups.shape[1], device=groups.device) >= counts.unsqueeze(1)
    return torch.empty_like(groups, dtype=torch.bool).scatter_(1, order, kept)


def only(allowed: Tensor | None, scores: Tensor) -> Tensor:
    """Return ``scores`` with ``-inf`` for weights that are not ``allowed`` (bool; None = all are)."""
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def check_allowed(allowed: Tensor | None, pattern: Pattern, shape: Sequence[int]) -> None:
    """Raise ``InputError`` if fewer weights are allowed than ``pattern`` keeps, in total or in a group."""
    if allowed is None:
        return
    if tuple(allowed.shape) != tuple(shape):
        raise InputError(f"allowed has the shape {tuple(allowed.shape)}: it must be the weight's, {tuple(shape)}")
    if (pattern.mask(allowed.float()) & ~allowed).any():
        raise InputError(
            f"{pattern!r} keeps weights that were pruned before: raise the sparsity with every pruning, or let weights "
            "come back (regrowth)"
        )


def select(scores: Tensor, pattern: Pattern, allowed: Tensor | None = None) -> Tensor:
    """Return the keep mask (bool ``[o, i]``) that ``pattern`` selects by ``scores`` (``[o, i]``, larger = keep).

    Only weights that are ``allowed`` (bool ``[o, i]``; None = all) are kept.

    >>> select(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), NM(2, 4))
    tensor([[ True, False, False,  True]])

    Raises:
        InputError: if the scores are not a matrix, contain NaN, or have a shape that the pattern does not support.
    """
    if scores.dim() != 2:
        raise InputError(f"scores have the shape {tuple(scores.shape)}: a matrix [outputs, inputs] is needed")
    if scores.isnan().any():
        raise InputError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: they cannot be ranked")
    pattern.check(scores.shape)
    check_allowed(allowed, pattern, scores.shape)
    return pattern.mask(only(allowed, scores))


@dataclass(frozen=True)
class PackedMask:
    """A keep mask packed to one bit per weight.

    Attributes:
        bits: uint8 ``[ceil(n / 8)]``; bit ``k`` (least significant first) of byte ``b`` is weight ``8 b + k``.
        shape: shape of the mask.

    Raises:
        InputError: if the bits are not uint8, or their number does not match the shape; masks may come from untrusted
            files.
    """

    bits: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ``InputError`` if the bits do not match the shape, before anything of that size is allocated."""
        shape = self.shape
        if not (isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)):
            raise InputError(f"a mask has the shape {shape!r}: a tuple of sizes, 0 or more, is needed")
        if not isinstance(self.bits, Tensor) or self.bits.dtype != torch.uint8:
            found = getattr(self.bits, "dtype", type(self.bits).__name__)
            raise InputError(f"the bits of a mask are {found}: a uint8 tensor is needed, with one bit for each weight")
        needed = -(-math.prod(shape) // 8)
        if tuple(self.bits.shape) != (needed,):
            raise InputError(
                f"a mask of the shape {list(shape)} has bits of the shape {list(self.bits.shape)}: [{needed}] is needed"
            )

    @classmethod
    def pack(cls, keep: Tensor) -> PackedMask:
        """Pack a bool mask of any shape."""
        if keep.dtype != torch.bool:
            raise InputError(f"a mask is {keep.dtype}: bool is needed, True for kept weights")
        flat = keep.reshape(-1).to(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
        return cls((flat << _bit_positions(keep.device)).sum(1, dtype=torch.uint8), tuple(keep.shape))

    def to(self, device: torch.device | str) -> PackedMask:
        """Return a copy on another device."""
        return PackedMask(self.bits.to(device), self.shape)

    def unpack(self) -> Tensor:
        """Return the mask as a bool tensor."""
        eights = _eight_bools(self.bits.device).index_select(0, self.bits.int())
        return eights.view(torch.bool)[: torch.Size(self.shape).numel()].reshape(self.shape)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Number of weights that are kept."""
        return int(self.unpack().count_nonzero())


def sparsity_of(masks: Iterable[PackedMask]) -> float:
    """Return the fraction of all weights that masks remove."""
    masks = list(masks)
    return 1 - sum(mask.kept for mask in masks) / sum(mask.numel for mask in masks)


def density_variances(keep: Tensor) -> tuple[float, float]:
    """Return the variances of the densities of rows and of columns of a keep mask, each over that of chance.

    Chance for the columns is the mask with every row's kept weights at random places: of ``i`` columns, a row that
    keeps ``k`` then adds ``k (i - k) / (i (i - 1))`` to the expected variance of the columns' counts. It is the same if
    ``k`` is fixed, as by N:M, or drawn with the whole matrix. Chance for the rows has every column's kept weights at
    random places. 1 = no structure; 0 = equal densities, as a pattern by row prescribes for the rows.

    >>> density_variances(torch.tensor([[True, True, False, False], [True, True, False, False]]))
    (0.0, 2.0)

    Args:
        keep: bool ``[..., o, i]``; several matrices are stacked.
    """
    keep = keep.reshape(-1, keep.shape[-1])
    return _variance_over_chance(keep.T), _variance_over_chance(keep)


def _variance_over_chance(keep: Tensor) -> float:
    """Return the variance of the column counts of a mask over that of chance; 0 if nothing varies by chance."""
    size = keep.shape[1]
    rows, columns = keep.sum(1).double(), keep.sum(0).double()
    chance = (rows * (size - rows)).sum() / size  # times (size - 1), as is the variance
    return ((columns - columns.mean()).square().sum() / chance).item() if chance else 0.0


def keep_only(values: Tensor, keep: Tensor) -> Tensor:
    """Return ``values`` (any float dtype) with exact zeros where ``keep`` (bool, same shape) is False.

    NaN and infinities are zeroed too. Masks whole words bitwise, because element-wise selection takes ten times as long
    on CPUs.
    """
    words = values.view(_WORDS[values.element_size()])
    return (words & -keep.view(torch.int8)).view(values.dtype)  # True is 1, and -1 has all bits set


def restored_masks(bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, PackedMask]:
    """Return the masks by name from a callback's state, which stores bits and shapes separately."""
    return {name: PackedMask(values, tuple(shapes[name])) for name, values in bits.items()}


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@cache
def _eight_bools(device: torch.device) -> Tensor:
    """Return the eight bools of every byte, viewed as int64 ``[256]``, so that one look-up copies eight values."""
    with torch.inference_mode(False):
        values = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)
        return ((values >> _bit_positions(device)) & 1).view(torch.int64).flatten()
