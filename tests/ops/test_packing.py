"""Packed weights: what is stored, what comes back, and damaged parts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops.packing import SLACK, Kind, Layout, PackedWeight, float_kind, pack
from lit_prune.ops.quantization import CHUNK

KINDS: tuple[Kind, ...] = ("bfloat16", "float16", "int8", "int4")
SHAPES = [(1, 1), (3, 7), (5, 64), (7, 200), (4, 130)]


def sparse(shape: tuple[int, int], sparsity: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    keep = torch.rand(shape, generator=generator) >= sparsity
    return weight * keep, keep


def test_the_parts_of_a_small_weight() -> None:
    # Two rows of three inputs, one byte of eight for the mask and padded to 64 inputs:
    #   ( 0  4  2)   keeps inputs 1 and 2: 0b110; -64 and -32 steps of -1/16, the finest grid with both
    #   (-1  0  0)   keeps input 0:        0b001; -64 steps of 1/64
    weight = torch.tensor([[0.0, 4.0, 2.0], [-1.0, 0.0, 0.0]])
    packed = pack(weight, weight != 0, "int8")
    assert packed.values[:3].tolist() == [-64, -32, -64] and len(packed.values) == 3 + SLACK
    assert packed.mask[:, 0].tolist() == [0b110, 0b001] and not packed.mask[:, 1:].any()
    assert packed.offsets().tolist() == [0, 2]
    # In 4 bits: -8 and -4 steps of -1/2, 0b1000 and 0b1100 in one byte; -8 steps of 1/8, alone in its byte.
    halves = pack(weight, weight != 0, "int4")
    assert halves.values[:2].tolist() == [0xC8, 0x08] and halves.offsets().tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_what_comes_back_is_rounded_and_as_sparse(kind: Kind, shape: tuple[int, int], masked: bool) -> None:
    weight, keep = sparse(shape, 0.6 if masked else 0.0)
    packed = pack(weight, keep if masked else None, kind)
    packed.check("layer")
    back = packed.unpack()
    assert torch.equal(packed.keep(), keep) and not back[~keep].any()
    if kind in ("bfloat16", "float16"):
        assert torch.equal(back, weight.to(getattr(torch, kind)).float())
        return
    scales = packed.scales.view(torch.bfloat16).float().abs()
    each = scales.repeat_interleave(CHUNK if kind == "int4" else packed.layout.chunks * CHUNK, 1)[:, : shape[1]]
    # Half a step within the grid; the chosen scales of 4-bit values may clip.
    clipped = (weight.abs() - {"int8": 127, "int4": 7}[kind] * each).clamp_min(0)
    assert ((back - weight).abs() <= torch.maximum(each * 0.5001, clipped * 1.0001)).all()


@given(
    st.integers(1, 5), st.integers(1, 140), st.floats(0, 1), st.sampled_from(KINDS), st.booleans(), st.integers(0, 99)
)
def test_every_weight_packs_and_its_unpacked_form_packs_to_the_same(
    outputs: int, inputs: int, sparsity: float, kind: Kind, masked: bool, seed: int
) -> None:
    weight, keep = sparse((outputs, inputs), sparsity, seed)
    packed = pack(weight, keep if masked else None, kind)
    packed.check("layer")
    assert packed.layout.parts()["values"][0] == tuple(packed.values.shape)
    again = pack(packed.unpack(), keep if masked else None, kind)
    assert torch.equal(again.unpack(), packed.unpack()) and torch.equal(again.mask, packed.mask)


def test_bits_per_weight() -> None:
    # At 4,096 inputs: one bit, and the kept fraction of 16, 8 or 4; 16 bits per row or per 64 inputs for the scales.
    expected: dict[tuple[Kind, float], float] = {
        ("float16", 0.5): 9.0,
        ("float16", 0.7): 5.8,
        ("int8", 0.5): 5.0,
        ("int8", 0.7): 3.4,
        ("int4", 0.5): 3.25,
        ("int4", 0.7): 2.45,
    }
    for (kind, sparsity), bits in expected.items():
        weight, keep = sparse((64, 4096), sparsity)
        assert pack(weight, keep, kind).bits_per_weight == pytest.approx(bits, abs=0.06)  # the mask is drawn


def test_weights_that_every_8_inputs_keep() -> None:
    def kept(keep: Tensor | None) -> int:
        return pack(torch.ones(2, 64), keep, "int8").kept_of_8()

    two_of_four = torch.tensor([True, False, False, True]).repeat(2, 16)
    assert (kept(None), kept(two_of_four), kept(torch.ones(2, 64).bool())) == (8, 4, 8)
    other = two_of_four.clone()
    other[1, 60:] = torch.tensor([True, True, True, False])
    assert kept(other) == 0
    # Inputs up to a multiple of 64 are pruned.
    assert pack(torch.ones(2, 60), two_of_four[:, :60], "int8").kept_of_8() == 0


def test_4_bits_lose_less_with_clipped_scales() -> None:
    weight, _ = sparse((64, 256), 0.0)
    back = pack(weight, None, "int4").unpack()
    plain = weight.reshape(64, -1, CHUNK)
    scale = plain.abs().amax(-1, keepdim=True) / 7
    rounded = ((plain / scale).round() * scale).reshape(weight.shape)
    assert (back - weight).square().sum() < 0.97 * (rounded - weight).square().sum()


def test_16_bits_keep_the_dtype_and_the_range() -> None:
    assert float_kind(torch.ones(2, 2, dtype=torch.bfloat16)) == "bfloat16"
    assert float_kind(torch.ones(2, 2)) == "float16"
    assert float_kind(torch.tensor([[1e5]])) == "bfloat16"  # float16 ends at 65,504


def damaged(packed: PackedWeight, part: str, index: tuple[int, ...], value: int) -> PackedWeight:
    values = getattr(packed, part).clone()
    values[index] = value
    return replace(packed, **{part: values})


def test_parts_that_do_not_belong_together_are_refused() -> None:
    weight, keep = sparse((4, 100), 0.5)
    packed = pack(weight, keep, "int8")
    absent = int(keep[0].logical_not().nonzero()[0])
    more = int(packed.mask[0, absent // 8]) | 1 << absent % 8
    for broken, said in (
        (replace(packed, values=packed.values[:-1]), "has values"),
        (replace(packed, values=packed.values.short()), "as torch.int16"),
        (replace(packed, mask=packed.mask[:, :-1]), "has mask"),
        (damaged(packed, "mask", (0, absent // 8), more), r"stores \d+ values, and its mask keeps \d+"),
        (damaged(packed, "scales", (1, 0), 0x7F80), "not finite"),
        (damaged(packed, "values", (0,), -128), "has the value -128"),
    ):
        with pytest.raises(InputError, match=said):
            broken.check("layer")
    # A bit behind the last input in exchange for one before it: the number of values is right.
    first = int(keep[0].nonzero()[0])
    moved = damaged(packed, "mask", (0, first // 8), int(packed.mask[0, first // 8]) & ~(1 << first % 8))
    with pytest.raises(InputError, match="behind its 100 inputs"):
        damaged(moved, "mask", (0, 15), 0x80).check("layer")


ENTRY = {"kind": "int8", "shape": [4, 100], "stored": 80, "masked": True}
BAD = {
    "no mapping": [1],
    "kind": {**ENTRY, "kind": "int2"},
    "one size": {**ENTRY, "shape": [4]},
    "negative": {**ENTRY, "shape": [4, -1]},
    "float": {**ENTRY, "shape": [4, 1.0]},
    "bool": {**ENTRY, "stored": True},
    "mask": {**ENTRY, "masked": 1},
    "unhashable": {**ENTRY, "kind": []},
    "absurd": {**ENTRY, "shape": [2**40, 4]},
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD)
def test_a_bad_description_is_refused(entry: object) -> None:
    with pytest.raises(InputError, match="the packed layer is described by"):
        Layout.of(entry, "layer")


def test_more_values_than_weights_are_refused() -> None:
    assert Layout.of(ENTRY, "layer") == Layout("int8", (4, 100), 80, True)
    with pytest.raises(InputError, match="too many"):
        Layout.of({**ENTRY, "stored": 10**9}, "layer")
