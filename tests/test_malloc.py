"""What is freed is kept for the next tensor."""

import platform
from functools import partial
from pathlib import Path

import pytest

from support.processes import run

FAULTS = """
import resource, torch
from lit_prune.malloc import keep_freed_memory
{keep}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def printed(folder: Path, program: str) -> int:
    """Return the number that a program prints in a process of its own."""
    return int(run(folder / "log", partial(exec, program, {})).said)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be told to keep memory")
def test_no_fresh_pages_for_the_next_tensor(tmp_path: Path) -> None:
    assert printed(tmp_path, FAULTS.format(keep="keep_freed_memory()")) * 10 < printed(tmp_path, FAULTS.format(keep=""))


LEFT = """
import torch
from lit_prune.malloc import give_back_freed_memory, keep_freed_memory
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
keep_freed_memory()
{give}
before = resident()
for _ in range(3):
    tensors = [torch.ones(1 << 22) for _ in range(16)]  # 16 MiB each
    del tensors
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be told to give memory back")
def test_what_is_freed_goes_back_to_the_system(tmp_path: Path) -> None:
    assert printed(tmp_path, LEFT.format(give="")) > 200_000  # KiB
    assert printed(tmp_path, LEFT.format(give="give_back_freed_memory()")) < 50_000
