"""Where memory goes that a CPU tensor has freed."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Have the GNU C library keep what is freed for the next tensor, in place of giving it back to the system.

    Large tensors otherwise live in fresh pages each time, and the system clears every page when it is first touched:
    for SmolLM2-135M on CPUs, a seventh of the time of training and three tenths of evaluation. The process keeps its
    peak of memory to its end.

    Returns:
        Whether this process's C library is the one that can be told so; any other is left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
