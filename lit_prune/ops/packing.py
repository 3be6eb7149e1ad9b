"""Packed weights: the kept values in 16, 8 or 4 bits, one after the other, and one mask bit per weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.errors import InputError
from lit_prune.ops.masks import PackedMask

Kind = Literal["bfloat16", "float16", "int8", "int4"]
"""Type of the kept values; the integers are symmetric, with a scale per row (int8) or per chunk of a row (int4)."""
CHUNK = 64
"""Number of inputs to which rows are padded, and that share a scale of 4-bit values."""
SLACK = 64
"""Number of unused bytes at the end of the values, so that a kernel may read whole vectors."""
_LARGEST = {"int8": 127, "int4": 7}
_CLIPS = torch.linspace(1.0, 0.7, 11)
"""Fractions of the largest 4-bit value at which the others may be clipped."""
_STORED = {"bfloat16": torch.int16, "float16": torch.int16, "int8": torch.int8, "int4": torch.uint8}
_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """Types and sizes of the parts of a packed weight."""

    kind: Kind
    """Type of the kept values."""
    shape: tuple[int, int]
    """Shape of the weight, ``(o, i)``."""
    stored: int
    """Number of elements of the values."""
    masked: bool
    """Whether there is a mask; without one, every weight is kept."""

    @classmethod
    def of(cls, entry: Any, name: str) -> Layout:
        """Return the layout in an entry of an untrusted config.

        Raises:
            InputError: if the entry does not describe a weight.
        """
        known = entry if isinstance(entry, Mapping) else {}
        kind, shape, stored, masked = (known.get(key) for key in ("kind", "shape", "stored", "masked"))
        sizes = shape if isinstance(shape, list) and all(type(n) is int and 1 <= n < 2**31 for n in shape) else []
        if kind not in get_args(Kind) or len(sizes) != 2 or type(stored) is not int or type(masked) is not bool:
            raise InputError(
                f"the packed {name} is described by {str(entry)[:100]}: kind ({', '.join(get_args(Kind))}), shape (two "
                "sizes), stored (a number) and masked (true or false) are needed"
            )
        outputs, inputs = sizes
        if not 0 <= stored <= outputs * _padded(inputs) + SLACK:
            raise InputError(f"the packed {name} has {stored} values for the shape {shape}: these are too many")
        return cls(cast(Kind, kind), (outputs, inputs), stored, masked)

    @property
    def chunks(self) -> int:
        """Number of chunks in a row."""
        return _padded(self.shape[1]) // CHUNK

    @property
    def groups(self) -> int:
        """Number of scales in a row; 0 for 16-bit values."""
        return {"int8": 1, "int4": self.chunks}.get(self.kind, 0)

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shapes and dtypes of the tensors; all are integers, so that no cast of a model changes them."""
        outputs = self.shape[0]
        return {
            "values": ((self.stored,), _STORED[self.kind]),
            "mask": ((outputs, self.chunks * 8) if self.masked else (0, 0), torch.uint8),
            "scales": ((outputs, self.groups) if self.groups else (0, 0), torch.int16),
        }


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[o, i]`` in packed form.

    Rows are padded with pruned weights to a multiple of 64 inputs; without a mask, with zeros. The values of a row
    follow one another, then those of the next row; 4-bit values are stored two per byte, the low half first, and every
    row starts at a byte. A weight is its value times its scale.

    Example: the row ``(0, 3, 0, -1)`` with int8 values has the scale 3 / 127, the values ``(127, -42)`` and the mask
    byte ``0b1010``, followed by seven zero bytes.
    """

    layout: Layout
    """Types and sizes."""
    values: Tensor
    """Kept values: int16 ``[n]`` (the bits of bfloat16 or float16), int8 ``[n]``, or uint8 ``[n]`` (two 4-bit values),
    with 64 more bytes."""
    mask: Tensor
    """Mask bits, uint8 ``[o, 8 * chunks]``, the least significant bit first; empty if every weight is kept."""
    scales: Tensor
    """Scales, int16 ``[o, groups]`` (the bits of bfloat16); empty for 16-bit values."""

    @property
    def nbytes(self) -> int:
        """Number of bytes, on disk and in memory."""
        return self.values.nbytes + self.mask.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Number of bits per weight, pruned weights included."""
        return 8 * self.nbytes / math.prod(self.layout.shape)

    def counts(self) -> Tensor:
        """Return the number of values in each row, int64 ``[o]``."""
        outputs, width = self.layout.shape[0], self.layout.chunks * CHUNK
        if not self.layout.masked:
            return torch.full((outputs,), width, device=self.values.device)
        return _bit_counts(self.mask).sum(1)

    def offsets(self) -> Tensor:
        """Return the index of the first element of ``values`` of each row, int64 ``[o]``."""
        elements = self._elements(self.counts())
        return elements.cumsum(0) - elements

    def _elements(self, counts: Tensor) -> Tensor:
        return (counts + 1) // 2 if self.layout.kind == "int4" else counts

    def check(self, name: str) -> None:
        """Raise ``InputError`` if the parts do not belong together; a kernel would read outside of them."""
        for part, (shape, dtype) in self.layout.parts().items():
            found: Tensor = getattr(self, part)
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise InputError(
                    f"the packed {name} has {part} {list(found.shape)} as {found.dtype}: {list(shape)} as {dtype} is "
                    "needed"
                )
        inputs, slack = self.layout.shape[1], SLACK // self.values.element_size()
        needed = int(self._elements(self.counts()).sum()) + slack
        if needed != len(self.values):
            raise InputError(f"the packed {name} stores {len(self.values)} values, and its mask keeps {needed} of them")
        if self.layout.masked and mask_bits(self.mask[:, inputs // 8 :])[:, inputs % 8 :].any():
            raise InputError(f"the packed {name} keeps weights behind its {inputs} inputs")
        if not self.scales.view(torch.bfloat16).isfinite().all():
            raise InputError(f"the packed {name} has scales that are not finite")

    def keep(self) -> Tensor:
        """Return the keep mask, bool ``[o, i]``."""
        outputs, inputs = self.layout.shape
        if not self.layout.masked:
            return torch.ones(outputs, inputs, dtype=torch.bool, device=self.values.device)
        return mask_bits(self.mask)[:, :inputs]

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[o, i]``."""
        (outputs, inputs), width = self.layout.shape, self.layout.chunks * CHUNK
        keep = mask_bits(self.mask) if self.layout.masked else self.mask.new_ones(outputs, width).bool()
        whole = torch.zeros(outputs, width, device=keep.device).masked_scatter_(keep, self._numbers())
        if self.layout.groups:
            scales = self.scales.view(torch.bfloat16).float().unsqueeze(-1)
            whole = (whole.reshape(outputs, self.layout.groups, -1) * scales).reshape(outputs, width)
        return whole[:, :inputs].to(dtype)

    def _numbers(self) -> Tensor:
        """Return all kept values, without scales, as float32."""
        if self.layout.kind in _FLOATS:
            return self.values.view(_FLOATS[self.layout.kind]).float()
        if self.layout.kind == "int8":
            return self.values.float()
        halves = torch.stack([self.values & 15, self.values >> 4], 1).flatten().to(torch.int8)
        counts = self.counts()
        used = torch.ones_like(halves, dtype=torch.bool)
        used[(2 * self.offsets() + counts)[counts % 2 == 1]] = False  # the padding of rows to whole bytes
        return (halves - 16 * (halves > 7))[used].float()


def pack(weight: Tensor, keep: Tensor | None, kind: Kind) -> PackedWeight:
    """Pack a weight, with its values rounded to nearest.

    Args:
        weight: ``[o, i]``, any float dtype.
        keep: keep mask, bool ``[o, i]``; None = every weight is kept, and nothing is stored for a mask.
        kind: type of the values.
    """
    outputs, inputs = weight.shape
    padding = (0, _padded(inputs) - inputs)
    weight = pad(weight.float(), padding)
    bits = None if keep is None else pad(keep, padding)
    weight = weight if bits is None else weight.masked_fill(~bits, 0.0)
    numbers, scales = _rounded(weight, kind)
    kept = numbers.flatten() if bits is None else numbers[bits]
    if kind == "int4":
        counts = torch.full((outputs,), weight.shape[1], device=weight.device) if bits is None else bits.sum(1)
        kept = _in_pairs(kept, counts)
    stored = kept.to(_FLOATS[kind]).view(torch.int16) if kind in _FLOATS else kept.to(_STORED[kind])
    stored = pad(stored, (0, SLACK // stored.element_size()))
    empty = torch.zeros(0, 0, dtype=torch.uint8, device=weight.device)
    mask = empty if bits is None else PackedMask.pack(bits).bits.reshape(outputs, -1)
    layout = Layout(kind, (outputs, inputs), len(stored), keep is not None)
    raw = empty.to(torch.int16) if scales is None else scales.view(torch.int16)
    return PackedWeight(layout, stored, mask, raw)


def float_kind(weight: Tensor) -> Kind:
    """Return the type of 16-bit values that keeps a weight best: its own, or float16 if its range allows."""
    fits = weight.dtype != torch.bfloat16 and weight.abs().amax() <= torch.finfo(torch.float16).max
    return "float16" if fits else "bfloat16"


def mask_bits(mask: Tensor) -> Tensor:
    """Return the bits of bytes, uint8 ``[o, b]``, as bool ``[o, 8 b]``, the least significant first."""
    return PackedMask(mask.flatten(), (mask.shape[0], 8 * mask.shape[1])).unpack()


def _rounded(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Return the values of a padded weight ``[o, w]`` before they are stored, and the scales, bfloat16 ``[o, g]``."""
    if kind in _FLOATS:
        return weight, None
    groups = weight.unsqueeze(1) if kind == "int8" else weight.reshape(len(weight), -1, CHUNK)
    scales = groups.abs().amax(-1, keepdim=True) / _LARGEST[kind]
    if kind == "int4":
        scales = _clipped(groups, scales)
    scales = scales.bfloat16()
    return _to_grid(groups, scales.float(), kind).reshape(weight.shape), scales.squeeze(-1)


def _clipped(groups: Tensor, scales: Tensor) -> Tensor:
    """Return the scales of 4-bit values with the least squared error, among some that clip the largest values."""
    best, least = scales, torch.full_like(scales, torch.inf)
    for clip in _CLIPS.tolist():
        tried = (scales * clip).bfloat16().float()
        error = (_to_grid(groups, tried, "int4") * tried - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _to_grid(groups: Tensor, scales: Tensor, kind: Kind) -> Tensor:
    return (groups / scales).nan_to_num_(0.0).round_().clamp_(-_LARGEST[kind], _LARGEST[kind])


def _in_pairs(values: Tensor, counts: Tensor) -> Tensor:
    """Return 4-bit values, row after row, two per byte; ``counts`` ``[o]`` is their number in each row."""
    padded = (counts + 1) // 2 * 2
    shift = (padded - counts).cumsum(0) - (padded - counts)  # empty halves before each row
    places = torch.arange(len(values), device=values.device) + shift.repeat_interleave(counts)
    halves = values.new_zeros(int(padded.sum())).to(torch.int8)
    halves[places] = values.to(torch.int8)
    low, high = (halves & 15).view(torch.uint8).reshape(-1, 2).unbind(1)
    return low | high << 4


def _padded(inputs: int) -> int:
    return -(-inputs // CHUNK) * CHUNK


def _bit_counts(mask: Tensor) -> Tensor:
    """Return the number of set bits of every byte, int64."""
    return mask_bits(mask).reshape(*mask.shape, 8).sum(-1)
