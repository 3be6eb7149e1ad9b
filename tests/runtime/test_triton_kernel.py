"""The Triton kernel against float64: interpreted, or on a GPU if ``TRITON_INTERPRET`` is 0; and compiled for GPUs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

triton = pytest.importorskip("triton")
from triton.runtime import interpreter  # noqa: E402

from lit_prune.ops import NM  # noqa: E402
from lit_prune.ops.packing import SLACK, Kind, PackedWeight, pack  # noqa: E402
from lit_prune.runtime.packed_layers import PackedLinear  # noqa: E402
from lit_prune.runtime.triton_kernel import MOST_TOKENS, TritonKernel  # noqa: E402
from support.rounding import gamma  # noqa: E402

KINDS: tuple[Kind, ...] = ("bfloat16", "float16", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
COMPILER = Path(__file__).parents[1] / "support" / "gpu_compiler.py"


@pytest.fixture(autouse=True, scope="module")
def only_inside() -> Iterator[None]:
    """Refuse every access outside of a kernel's arguments, and to the slack behind the values."""
    if not INTERPRETED:
        yield
        return
    spans: list[tuple[int, int]] = []
    call, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(self: Any, values: Tensor, *args: Any, **kwargs: Any) -> None:
        others = [(arg.data_ptr(), arg.nbytes) for arg in args if isinstance(arg, Tensor)]
        spans[:] = [(start, start + size) for start, size in ((values.data_ptr(), values.nbytes - SLACK), *others)]
        call(self, values, *args, **kwargs)

    def check(pointers: Any, mask: Any) -> None:
        first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        last = first + np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        inside = [(first >= np.uint64(start)) & (last <= np.uint64(end)) for start, end in spans]
        assert np.logical_or.reduce(inside).all(), "an access outside of the arguments"

    def checked_load(pointers: Any, mask: Any, *args: Any) -> Any:
        check(pointers, mask)
        return load(pointers, mask, *args)

    def checked_store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        check(pointers, mask)
        return store(pointers, value, mask, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", note)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


def packed_random(kind: Kind, shape: tuple[int, int], sparsity: float | None) -> PackedWeight:
    keep = None if sparsity is None else torch.rand(shape, device=DEVICE) >= sparsity
    packed = pack(torch.randn(shape, device=DEVICE), keep, kind)
    packed.check("weight")
    return packed


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to a dtype; Triton's interpreter cuts the last bits off for bfloat16."""
    if dtype == torch.bfloat16 and INTERPRETED:
        weight = weight.view(torch.int32).bitwise_and(-1 << 16).view(torch.float32)
    return weight.to(dtype)


def check_product(packed: PackedWeight, x: Tensor) -> None:
    """Check a product against float64, with the weights in the precision in which they are multiplied."""
    y = TritonKernel(packed).multiply(x)
    assert y.dtype == x.dtype
    exact = len(x) <= 1 or packed.layout.kind == "int8"
    check_sums(y, x, cast(packed.unpack(), torch.float32 if exact else x.dtype).double())


def check_sums(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Check sums in float32, each rounded to the dtype of the tokens; 8 more products are for the scale."""
    expected, sizes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    error = gamma(weight.shape[1] + 8, torch.float32) * sizes
    if y.dtype != torch.float32:
        unit, smallest = torch.finfo(y.dtype).eps, torch.finfo(y.dtype).tiny
        unit *= 1.0 if y.dtype == torch.bfloat16 and INTERPRETED else 0.5  # see cast
        error += unit * (expected.abs() + error + smallest)
    assert ((y.double() - expected).abs() <= error).all()


@given(
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 40), st.integers(1, 700)),
    st.sampled_from([None, 0.0, 0.5, 0.97, 1.0]),
    st.integers(0, MOST_TOKENS),
    st.integers(0, 9),
)
def test_products_of_any_shape(
    kind: Kind, dtype: torch.dtype, shape: tuple[int, int], sparsity: float | None, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = packed_random(kind, shape, sparsity)
    check_product(packed, torch.randn(tokens, shape[1], device=DEVICE).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_every_number_of_tokens(kind: Kind, sparsity: float | None) -> None:
    torch.manual_seed(0)
    packed = packed_random(kind, (18, 130), sparsity)
    for tokens, dtype in zip(range(MOST_TOKENS + 1), 6 * DTYPES, strict=False):
        check_product(packed, torch.randn(tokens, 130, device=DEVICE).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_rows_of_several_tiles(kind: Kind, sparsity: float | None) -> None:
    torch.manual_seed(0)
    packed = packed_random(kind, (3, 9001), sparsity)
    for tokens in (1, 2):
        check_product(packed, torch.randn(tokens, 9001, device=DEVICE))
    assert torch.equal(TritonKernel(packed).expand(0, 3), packed.unpack())


@pytest.mark.parametrize("kind", KINDS)
def test_masks_with_empty_rows_and_of_two_in_four(kind: Kind) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 200, device=DEVICE)
    empty = torch.rand_like(weight) > 0.5
    empty[[0, 7, 8, 19]] = False
    for keep in (empty, NM(2, 4).mask(weight.abs()), torch.zeros_like(empty)):
        for tokens in (1, 5):
            check_product(pack(weight, keep, kind), torch.randn(tokens, 200, device=DEVICE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (7, 200)], ids=str)
def test_expanded_rows_are_those_of_the_unpacked_weight(kind: Kind, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for sparsity, dtype in product((None, 0.5, 1.0), DTYPES):
        packed = packed_random(kind, shape, sparsity)
        kernel, dense = TritonKernel(packed), cast(packed.unpack(), dtype)
        assert torch.equal(kernel.expand(0, shape[0], dtype), dense)
        assert torch.equal(kernel.expand(shape[0] // 2, shape[0], dtype), dense[shape[0] // 2 :])


def test_float64_tokens_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    packed, x = packed_random("int8", (5, 70), 0.5), torch.randn(3, 70, device=DEVICE)
    y = TritonKernel(packed).multiply(x.double())
    assert y.dtype == torch.float64 and torch.equal(y, TritonKernel(packed).multiply(x).double())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # what NumPy says of infinity times zero
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 2])
def test_inputs_that_are_not_finite_are_not_hidden(tokens: int, bad: float) -> None:
    x = torch.ones(tokens, 70, device=DEVICE)
    x[-1, 69] = bad
    y = TritonKernel(pack(torch.ones(3, 70, device=DEVICE), None, "float16")).multiply(x)
    assert not y[-1].isfinite().any() and y[:-1].isfinite().all()


def test_inputs_of_another_width_or_device_are_refused() -> None:
    kernel = TritonKernel(packed_random("int8", (3, 70), None))
    for x in (torch.ones(1, 71, device=DEVICE), torch.ones(17, 70, device=DEVICE), torch.ones(1, 70, device="meta")):
        with pytest.raises(ValueError, match="at most 16 tokens of 70"):
            kernel.multiply(x)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does not check addresses")
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_the_check_of_addresses_notices_what_is_outside(sparsity: float | None) -> None:
    packed = packed_random("int8", (4, 100), sparsity)
    kernel = TritonKernel(replace(packed, values=packed.values[40:]))
    for tokens in (1, 2):
        with pytest.raises(interpreter.InterpreterError, match="outside of the arguments"):
            kernel.multiply(torch.ones(tokens, 100))
    with pytest.raises(interpreter.InterpreterError, match="outside of the arguments"):
        kernel.expand(0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_expand_the_weight_for_many_tokens(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonKernel, "most_expanded", 300)  # three rows at a time
    torch.manual_seed(0)
    packed = packed_random(kind, (10, 100), 0.5)
    layer = PackedLinear(packed.layout, torch.nn.Parameter(torch.randn(10, device=DEVICE)), device=DEVICE)
    layer.set(packed)
    layer._kernel = TritonKernel(packed)
    for shape in ((100,), (1, 100), (4, 4, 100), (17, 100), (2, 20, 100)):
        x = torch.randn(shape, device=DEVICE)
        assert layer(x).shape == (*shape[:-1], 10)
        y = (layer(x) - layer.bias).detach()
        bound = gamma(110, torch.float32) * (x.abs() @ packed.unpack().abs().T + layer.bias.abs())
        assert ((y - linear(x.double(), packed.unpack().double())).abs() <= 2 * bound).all()


@pytest.mark.skipif(not INTERPRETED, reason="the GPU has compiled it")
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
def test_it_compiles_for_gpus(target: str, tmp_path: Path) -> None:
    # The interpreter takes more than the compiler: types that change in a loop, say, or names of Python.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(COMPILER), *target.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout.split()[0]) > 20
