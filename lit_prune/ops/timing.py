"""Durations that include the work of an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a function takes until the accelerator, if there is one, has finished its work."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
