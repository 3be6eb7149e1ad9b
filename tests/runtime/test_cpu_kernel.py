"""The C++ kernel against float64, for every kind of values, in its fast and in its portable form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_prune.ops.packing import Kind, pack
from lit_prune.runtime import cpu_kernel
from lit_prune.runtime.cpu_kernel import MOST_TOKENS, CpuKernel, forms, library
from support.rounding import check_sums

SHAPES = [(1, 1), (3, 7), (5, 64), (7, 200), (33, 576), (150, 640)]  # the last on several threads


def rounded(x: Tensor) -> Tensor:
    """Return inputs rounded to 8 bits, with a scale for every 32 of a token, as the kernel does for integers."""
    parts = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).reshape(len(x), -1, 32)
    scales = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts * (1 / scales)).nan_to_num(0, 0, 0).round()
    return (whole.double() * scales.double()).reshape(len(x), -1)[:, : x.shape[-1]]


@pytest.mark.parametrize("instructions", forms())
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_unpacked_weight(kind: Kind, shape: tuple[int, int], instructions: str) -> None:
    torch.manual_seed(0)
    loaded = library()
    assert loaded, "a C++ compiler is needed to test the kernel"
    for sparsity in (None, 0.0, 0.5, 0.97, 1.0):
        weight = torch.randn(shape)
        packed = pack(weight, None if sparsity is None else torch.rand(shape) >= sparsity, kind)
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
