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
