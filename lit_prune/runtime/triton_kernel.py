"""The Triton kernel of packed weights, for CUDA devices; with ``TRITON_INTERPRET=1``, for tests on CPUs.

A program takes some rows of the weight and walks along their inputs, tile by tile. The place of a kept weight's value
is the number of mask bits before it, which is a prefix sum over the bits of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_prune.ops.packing import FLOATS, PackedWeight

MOST_TOKENS = 16
"""Largest number of tokens that the kernel multiplies at once."""
_ROWS = 16
"""Number of rows in a program that multiplies several tokens: the fewest that tensor cores take."""
_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernel; its ``dot`` takes bfloat16 for integers."""
_TILE = 4096
"""Number of weights in a tile: for 128 threads, 32 each, whose loads are under way together."""


class TritonKernel:
    """Products and expansion of a packed weight whose parts are on a CUDA device and have been checked."""

    most_tokens = MOST_TOKENS
    most_expanded = 1 << 24
    """Number of weights to expand at once, 32 MB with 16 bits: enough for the device to be busy."""

    def __init__(self, weight: PackedWeight) -> None:
        """Store the weight, and where the values of each row begin.

        Args:
            weight: a packed weight for which ``check`` raises nothing; the kernel does not look for errors.
        """
        layout = weight.layout
        values = weight.values.contiguous()
        self._weight = (
            values.view(FLOATS[layout.kind]) if layout.kind in FLOATS else values,
            weight.mask.contiguous() if layout.masked else None,
            weight.offsets().contiguous() if layout.masked else None,
            weight.scales.contiguous().view(torch.bfloat16) if layout.groups else None,
        )
        self._shape, self._chunks = layout.shape, layout.chunks

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., o]``, of at most 16 tokens ``[..., i]``, in their dtype; sums are in float32.

        For several tokens, 4-bit weights times their scale are rounded to the dtype of the tokens, as are 16-bit values
        of another dtype.
        """
        (outputs, inputs), device = self._shape, self._weight[0].device
        tokens, dtype = x.numel() // inputs, x.dtype
        if x.shape[-1] != inputs or tokens > MOST_TOKENS or x.device != device:
            raise ValueError(
                f"inputs have the shape {list(x.shape)} on {x.device}: at most {MOST_TOKENS} tokens of {inputs} on "
                f"{device} are needed"
            )
        x = (x if dtype in _ACTIVATIONS else x.float()).contiguous()
        y = x.new_empty(*x.shape[:-1], outputs)
        padded, rows = (1, 1) if tokens == 1 else (MOST_TOKENS, _ROWS)
        if tokens:
            with torch.cuda.device_of(y):
                _multiply[(triton.cdiv(outputs, rows),)](
                    *self._weight, x, y, tokens, outputs, inputs, self._chunks, padded, rows, self._width(rows)
                )
        return y.to(dtype)

    def expand(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows from ``first`` to ``last`` of the weight, ``[last - first, i]``."""
        outputs, inputs = self._shape
        whole = torch.empty(last - first, inputs, dtype=dtype, device=self._weight[0].device)
        with torch.cuda.device_of(whole):
            _expand[(last - first,)](*self._weight, whole, first, outputs, inputs, self._chunks, self._width(1))
        return whole

    def _width(self, rows: int) -> int:
        """Return the number of inputs in a tile, a power of two."""
        return min(_TILE // rows, triton.next_power_of_2(64 * self._chunks))


@triton.jit
def _multiply(
    values: tl.tensor,
    mask: tl.tensor,
    offsets: tl.tensor,
    scales: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    chunks: tl.tensor,
    padded: tl.constexpr,
    count: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """Write the product of tokens ``x`` ``[t, i]`` and ``count`` rows of the weight to ``y`` ``[t, o]``.

    Args:
        values: see ``_weights``, as for all that is not listed here.
        mask: see there.
        offsets: see there.
        scales: see there.
        x: pointer to the tokens.
        y: pointer to the products.
        tokens: number of tokens.
        outputs: number of rows of the weight.
        inputs: see there.
        chunks: see there.
        padded: number of tokens that are computed: 1, or 16 for tensor cores.
        count: number of rows in a program.
        width: see there.
    """
    rows = tl.program_id(0).to(tl.int64) * count + tl.arange(0, count)
    token = tl.arange(0, padded).to(tl.int64)
    before = tl.zeros([count], tl.int32)
    sums = tl.zeros([count, padded], tl.float32)
    for first in range(0, inputs, width):
        weights, before = _weights(values, mask, offsets, scales, rows, first, before, outputs, inputs, chunks, width)
        column = first + tl.arange(0, width)
        exists = (token < tokens)[:, None] & (column < inputs)[None, :]
        part = tl.load(x + (token * inputs)[:, None] + column[None, :], mask=exists, other=0.0)
        if padded == 1:
            sums += tl.sum(weights * part.to(tl.float32), 1, keep_dims=True)
        else:
            weights = weights.to(part.dtype)  # as in a dense layer
            if _INTERPRETED:
                weights, part = weights.to(tl.float32), part.to(tl.float32)
            sums = tl.dot(weights, tl.trans(part), sums, input_precision="ieee")
    if values.dtype.element_ty == tl.int8:
        sums *= tl.load(scales + rows, mask=rows < outputs, other=0.0).to(tl.float32)[:, None]
    exists = (rows < outputs)[:, None] & (token < tokens)[None, :]
    tl.store(y + (token * outputs)[None, :] + rows[:, None], sums.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _expand(
    values: tl.tensor,
    mask: tl.tensor,
    offsets: tl.tensor,
    scales: tl.tensor,
    whole: tl.tensor,
    start: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    chunks: tl.tensor,
    width: tl.constexpr,
) -> None:
    """Write a row of the weight, one of those from ``start`` on, to ``whole`` ``[n, i]``."""
    place = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rows = place + start
    before = tl.zeros([1], tl.int32)
    scale = tl.full([1], 1.0, tl.float32)
    if values.dtype.element_ty == tl.int8:
        scale = tl.load(scales + rows).to(tl.float32)
    for first in range(0, inputs, width):
        weights, before = _weights(values, mask, offsets, scales, rows, first, before, outputs, inputs, chunks, width)
        column = first + tl.arange(0, width)
        target = whole + (place * inputs)[:, None] + column[None, :]
        tl.store(target, (weights * scale[:, None]).to(whole.dtype.element_ty), mask=(column < inputs)[None, :])


@triton.jit
def _weights(
    values: tl.tensor,
    mask: tl.tensor,
    offsets: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    before: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    chunks: tl.tensor,
    width: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return a tile of the weight, float32 ``[r, width]``, and the number of values of each row before the next tile.

    Args:
        values: pointer to the values; uint8 are two of 4 bits.
        mask: pointer to the bytes of the mask; None = every weight is kept.
        offsets: pointer to the place of each row's first value; None without a mask.
        scales: pointer to the scales; None for 16-bit values. That of an 8-bit row is left to the caller.
        rows: numbers of the rows, int64 ``[r]``; some may lie behind the last row.
        first: first input of the tile.
        before: number of values before the tile, int32 ``[r]``.
        outputs: number of rows of the weight.
        inputs: number of inputs.
        chunks: number of chunks of 64 inputs, to which a row is padded.
        width: number of inputs in the tile, a power of two and at least 64.
    """
    in_bytes: tl.constexpr = values.dtype.element_ty == tl.uint8
    column = first + tl.arange(0, width)
    exists = (rows < outputs)[:, None] & (column < inputs)[None, :]
    if mask is None:
        kept = exists
        place = tl.broadcast_to(column[None, :], exists.shape)
        start = rows * (chunks * (32 if in_bytes else 64))
    else:
        byte = first // 8 + tl.arange(0, width // 8)
        known = (rows < outputs)[:, None] & (byte < chunks * 8)[None, :]
        packed = tl.load(mask + (rows * (chunks * 8))[:, None] + byte[None, :], mask=known, other=0).to(tl.int32)
        bits = tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, exists.shape)
        kept = bits != 0
        start = tl.load(offsets + rows, mask=rows < outputs, other=0)
        place = tl.cumsum(bits, 1)  # and one less, for weights that are kept
        if in_bytes:
            place += before[:, None] - 1
        else:
            start += before - 1
        before += tl.sum(bits, 1)
    if in_bytes:
        pair = tl.load(values + start[:, None] + (place >> 1), mask=kept, other=0).to(tl.int32)
        half = (pair >> ((place & 1) * 4)) & 15
        numbers = ((half ^ 8) - 8).to(tl.float32)  # two's complement
        scale = tl.load(scales + (rows * chunks)[:, None] + (column // 64)[None, :], mask=exists, other=0.0)
        tile = tl.where(kept, numbers, 0.0) * scale.to(tl.float32)
    else:
        tile = tl.load(values + start[:, None] + place, mask=kept, other=0).to(tl.float32)
    return tile, before
