"""What is freed is kept for the next tensor."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from lit_prune.freed_memory import keep_freed_memory
{keep}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(keep: str) -> int:
    return int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be told to keep memory")
def test_no_fresh_pages_for_the_next_tensor() -> None:
    assert page_faults("keep_freed_memory()") * 10 < page_faults("")


LEFT = """
import torch
from lit_prune.freed_memory import give_back_freed_memory, keep_freed_memory
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


def left_over(give: str) -> int:
    return int(subprocess.run([sys.executable, "-c", LEFT.format(give=give)], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be told to give memory back")
def test_what_is_freed_goes_back_to_the_system() -> None:
    assert left_over("") > 200_000  # KiB
    assert left_over("give_back_freed_memory()") < 50_000
