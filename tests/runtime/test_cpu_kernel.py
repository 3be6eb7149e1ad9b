"""The C++ kernel against float64, for every kind of values, in every form that this processor can run."""

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_prune.ops import NM
from lit_prune.ops.packing import Kind, pack
from lit_prune.runtime import cpu_kernel
from lit_prune.runtime.cpu_kernel import MOST_TOKENS, CpuKernel, forms, library
from support.rounding import check_sums

SHAPES = [(1, 1), (3, 7), (5, 64), (7, 200), (33, 576), (150, 640)]  # the last on several threads
KINDS: tuple[Kind, ...] = ("bfloat16", "float16", "int8", "int4")


def masks(shape: tuple[int, int]) -> list[Tensor | None]:
    """Return keep masks from all weights, without and with a mask, to none, and 2:4 where the inputs allow it."""
    drawn = [torch.rand(shape) >= sparsity for sparsity in (0.0, 0.5, 0.97, 1.0)]
    return [None, *drawn, *([NM(2, 4).mask(torch.rand(shape))] if shape[1] % 4 == 0 else [])]


def rounded(x: Tensor) -> Tensor:
    """Return inputs rounded to 8 bits, with a scale for every 32 of a token, as the kernel does for integers."""
    parts = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).reshape(len(x), -1, 32)
    scales = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts * (1 / scales)).nan_to_num(0, 0, 0).round()
    return (whole.double() * scales.double()).reshape(len(x), -1)[:, : x.shape[-1]]


@pytest.mark.parametrize("instructions", forms())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_unpacked_weight(kind: Kind, shape: tuple[int, int], instructions: str) -> None:
    torch.manual_seed(0)
    loaded = library()
    assert loaded, "a C++ compiler is needed to test the kernel"
    for keep in masks(shape):
        packed = pack(torch.randn(shape), keep, kind)
        dense = packed.unpack()
        kernel = CpuKernel(loaded, packed, instructions)
        assert torch.equal(kernel.expand(0, shape[0]), dense)
        assert torch.equal(kernel.expand(shape[0] // 2, shape[0]), dense[shape[0] // 2 :])
        for tokens in range(MOST_TOKENS + 1):
            # Eighths of integers up to 127, with 127 / 8 in every part: rounding to 8 bits changes nothing.
            x = torch.randint(-127, 128, (tokens, shape[1])).float() / 8
            x[:, ::32] = 127 / 8
            sizes = x.abs().double() @ dense.abs().double().T
            check_sums(kernel.multiply(x), x.double() @ dense.double().T, shape[1] + 8, sizes)


def test_inputs_are_rounded_to_8_bits_for_integers() -> None:
    torch.manual_seed(0)
    packed = pack(torch.randn(5, 100), torch.rand(5, 100) > 0.5, "int8")
    x = torch.randn(3, 100)
    loaded = library()
    assert loaded
    y = CpuKernel(loaded, packed).multiply(x)
    dense = packed.unpack().double()
    # A value within rounding of the middle between two integers may go to either: one step of 1 / 127 of the largest.
    step = x.abs().amax() / 127 * dense.abs().amax()
    assert ((y - rounded(x) @ dense.T).abs() <= step).all()
    assert (y - x.double() @ dense.T).abs().max() < 0.02 * (x.abs().double() @ dense.abs().T).max()


@pytest.mark.parametrize("instructions", forms())
@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_inputs_that_are_not_finite_are_not_hidden(kind: Kind, bad: float, instructions: str) -> None:
    loaded = library()
    assert loaded
    x = torch.ones(2, 70)
    x[1, 69] = bad
    packed = pack(torch.ones(3, 70), None, kind)
    y = CpuKernel(loaded, packed, instructions).multiply(x)
    assert y[0].isfinite().all()
    assert (y[1] > 1e38).all() if bad == 3e38 else not y[1].isfinite().any()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_all_forms_round_inputs_alike(kind: Kind) -> None:
    torch.manual_seed(0)
    loaded = library()
    assert loaded
    packed = pack(torch.randn(9, 200), torch.rand(9, 200) > 0.5, kind)
    # Random inputs, and halves between two integers, which go to the even one: one step more is 1 / 127.
    x = torch.cat([torch.randn(2, 200), (torch.randint(-126, 126, (2, 200)) + 0.5)])
    x[2:, ::32] = 127
    expected = CpuKernel(loaded, packed, "portable").multiply(x)
    sizes = x.abs().double() @ packed.unpack().abs().double().T
    for instructions in forms():
        check_sums(CpuKernel(loaded, packed, instructions).multiply(x), expected, 208, sizes)


def test_the_forms_are_those_of_the_processor() -> None:
    assert forms()[-1] == "portable" and cpu_kernel.instructions() == forms()[0]
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text().split()) if information.is_file() else set()
    needed = {
        "AVX-512": {"avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512bw", "avx512vl"},
        "AVX2": {"avx2", "bmi2"},
    }
    assert set(forms()) - {"portable"} == {name for name, instructions in needed.items() if instructions <= flags}


def at_the_end_of_memory(part: Tensor) -> Tensor:
    """Return a copy that ends where the process may not read on."""
    if not part.numel():
        return part
    length = -(-part.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + length), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=part.dtype, count=part.numel(), offset=length - part.nbytes)
    return copy.reshape(part.shape).copy_(part)


@pytest.mark.parametrize("instructions", forms())
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_behind_the_parts(kind: Kind, instructions: str) -> None:
    torch.manual_seed(0)
    loaded = library()
    assert loaded
    for shape in ((1, 1), (3, 64), (9, 130), (5, 256)):
        for keep in masks(shape):
            packed = pack(torch.randn(shape), keep, kind)
            parts = {part: at_the_end_of_memory(getattr(packed, part)) for part in ("values", "mask", "scales")}
            kernel = CpuKernel(loaded, replace(packed, **parts), instructions)
            assert torch.equal(kernel.expand(0, shape[0]), packed.unpack())
            for tokens in (1, 2, 8):
                x = at_the_end_of_memory(torch.randn(tokens, shape[1]))
                assert torch.equal(kernel.multiply(x), CpuKernel(loaded, packed, instructions).multiply(x))


def test_the_memory_ends_where_the_part_does() -> None:
    part = at_the_end_of_memory(torch.zeros(3))
    libc, (_, pipe) = ctypes.CDLL(None), os.pipe()
    behind = part.data_ptr() + part.nbytes
    assert libc.write(pipe, ctypes.c_void_p(behind - 1), 1) == 1
    assert libc.write(pipe, ctypes.c_void_p(behind), 1) == -1  # where the kernel would be killed


def test_tiny_and_zero_inputs() -> None:
    loaded = library()
    assert loaded
    kernel = CpuKernel(loaded, pack(torch.ones(3, 70), None, "int8"))
    assert not kernel.multiply(torch.zeros(1, 70)).any()
    assert not kernel.multiply(torch.full((1, 70), 1e-44)).any()  # 127 / 1e-44 is infinite


def test_inputs_of_another_width_are_refused() -> None:
    loaded = library()
    assert loaded
    kernel = CpuKernel(loaded, pack(torch.ones(3, 70), None, "int8"))
    for shape in ((1, 71), (9, 70)):
        with pytest.raises(ValueError, match="at most 8 tokens of 70"):
            kernel.multiply(torch.ones(shape))


@pytest.mark.parametrize("fault", ["missing", "failing", "no cache"])
def test_without_a_compiler_a_warning_says_so(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no space" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if fault != "missing" else "")
    monkeypatch.setenv("CXX", str(compiler) if fault != "missing" else "absent")
    home = tmp_path / "home"
    home.touch() if fault == "no cache" else home.mkdir()
    monkeypatch.setattr(cpu_kernel.constants, "HF_HOME", str(home))
    said = {
        "missing": "there is no C\\+\\+ compiler",
        "failing": "does not compile .*no space",
        "no cache": "cannot be",
    }
    library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"packed layers use torch's product .*{said[fault]}"):
            assert library() is None
        assert cpu_kernel.instructions() == "none"
    finally:
        library.cache_clear()


def test_processes_compile_at_the_same_time(tmp_path: Path) -> None:
    command = "from lit_prune.runtime.cpu_kernel import instructions; print(instructions())"
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", command], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert {process.communicate()[0].strip() for process in started} == {forms()[0]}
    assert len(list((tmp_path / "lit-prune").iterdir())) == 1
