"""Which kernel a device gets, and what is said if it gets none."""

import sys

import pytest
import torch

from lit_prune.ops.packing import pack
from lit_prune.runtime import kernel
from lit_prune.runtime.cpu_kernel import CpuKernel
from lit_prune.runtime.kernel import kernel_on

CUDA = torch.device("cuda", 5)  # which no machine has that runs the tests


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    kernel._triton.cache_clear()


def test_cpus_get_the_compiled_kernel() -> None:
    make = kernel_on(torch.device("cpu"))
    assert make
    assert isinstance(make(pack(torch.ones(2, 3), None, "int8")), CpuKernel)


@pytest.mark.parametrize(
    ("device", "capability", "said"),
    [
        ("mps", None, "there is no kernel for mps devices"),
        ("cuda:5", (7, 5), "cuda:5 has compute capability 7.5, and Triton needs 8.0"),
        ("cuda:5", (8, 0), r"Triton does not work on cuda:5 \(.+\)"),
    ],
)
def test_without_a_kernel_one_warning_says_so(
    device: str, capability: tuple[int, int] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capability:
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.warns(UserWarning, match=f"packed layers use torch's product of .*: {said}") as warned:
        assert kernel_on(torch.device(device)) is None
        assert kernel_on(torch.device(device)) is None
    assert len(warned) == 1


def test_without_triton_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lit_prune.runtime.triton_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="Triton cannot be imported .*comes with torch for CUDA"):
        assert kernel_on(CUDA) is None


def test_a_gpu_gets_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernel = pytest.importorskip("lit_prune.runtime.triton_kernel")
    monkeypatch.setattr(kernel, "_obstacle", lambda _: None)
    assert kernel_on(CUDA) is triton_kernel.TritonKernel
