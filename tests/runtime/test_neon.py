"""The C++ kernel's form for 64-bit ARM, compiled for it and run by an emulator."""

import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from lit_prune.ops import NM
from lit_prune.ops.packing import Kind, PackedWeight, pack
from lit_prune.runtime import cpu_kernel
from support.rounding import check_sums

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
KINDS: tuple[Kind, ...] = get_args(Kind)


def stored(packed: PackedWeight, x: Tensor) -> bytes:
    """Return what ``run_kernel.cpp`` reads: ten sizes, values, mask, offsets, scales and inputs."""
    layout = packed.layout
    parts = (packed.values, packed.mask, packed.scales)
    kind, groups = KINDS.index(layout.kind), layout.groups or layout.chunks
    shape = (layout.shape[0], layout.chunks, groups, kind, packed.kept_of_8(), layout.shape[1], len(x))
    sizes = torch.tensor([*shape, *(part.nbytes for part in parts)], dtype=torch.int32)
    tensors = (sizes, packed.values, packed.mask, packed.offsets(), packed.scales, x)
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program that runs every form of the kernel."""
    for needed, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is needed, from Debian's {package}")
    path = tmp_path_factory.mktemp("arm") / "run_kernel"
    sources = [Path(__file__).with_name("run_kernel.cpp"), cpu_kernel.SOURCE]
    flags = ["-std=c++17", "-O1", "-static", "-fopenmp", f"-I{cpu_kernel.SOURCE.parent}"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(path)], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_products_on_arm_are_those_of_the_unpacked_weight(kind: Kind, program: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights: list[PackedWeight] = []
    for shape in ((1, 1), (3, 7), (5, 64), (7, 200), (9, 640)):
        drawn = [torch.rand(shape) >= sparsity for sparsity in (0.0, 0.5, 0.97, 1.0)]
        keeps = [None, *drawn, *([NM(2, 4).mask(torch.rand(shape))] if shape[1] % 4 == 0 else [])]
        weights += [pack(torch.randn(shape), keep, kind) for keep in keeps]
    cases: list[tuple[PackedWeight, Tensor]] = []
    for packed in weights:
        for tokens in range(1, cpu_kernel.MOST_TOKENS + 1):
            # As on other processors: rounding to 8 bits changes nothing in the first token; it does in the others.
            x = torch.randint(-127, 128, (tokens, packed.layout.shape[1])).float() / 8
            x[:, ::32] = 127 / 8
            x[1:] += torch.rand_like(x[1:]) / 16
            cases.append((packed, x))
    given, found = tmp_path / "given", tmp_path / "found"
    given.write_bytes(b"".join(stored(*case) for case in cases))
    run = [EMULATOR, str(program), str(given), str(found)]
    names = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert names == ["NEON", "portable"] * len(cases)
    numbers = torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.float32)
    for packed, x in cases:
        outputs, inputs = packed.layout.shape
        dense, sizes = packed.unpack(), x.abs().double() @ packed.unpack().abs().double().T
        results: list[Tensor] = []
        for _ in ("NEON", "portable"):
            y, numbers = numbers[: len(x) * outputs], numbers[len(x) * outputs :]
            whole, numbers = numbers[: outputs * inputs], numbers[outputs * inputs :]
            assert torch.equal(whole.reshape(outputs, inputs), dense)
            results.append(y.reshape(len(x), outputs))
        neon, portable = results
        check_sums(neon, portable, inputs + 8, sizes)
        exact = slice(None) if packed.layout.groups == 0 else slice(1)  # the inputs that rounding does not change
        check_sums(neon[exact], x[exact].double() @ dense.double().T, inputs + 8, sizes[exact])
    assert not len(numbers)
