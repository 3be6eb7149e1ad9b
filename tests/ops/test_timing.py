"""Durations of work, the accelerator's included."""

import time

from lit_prune.ops.timing import seconds_of


def test_the_work_is_done_once_and_its_duration_returned() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.05)

    assert seconds_of(work) >= 0.05 and calls == [1]
