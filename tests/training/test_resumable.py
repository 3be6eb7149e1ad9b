"""The loader alone; tests/callbacks resumes whole runs with it."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch.utils.data import DistributedSampler

from lit_prune.training.data import Windows
from lit_prune.training.resumable import ResumableLoader


def loader(processes: int = 1, rank: int = 0, num_workers: int = 0) -> ResumableLoader:
    dataset = Windows(torch.arange(11).unsqueeze(1))  # the last batch is short, and two processes share unevenly
    order = DistributedSampler(dataset, processes, rank, shuffle=True, seed=0)
    return ResumableLoader(dataset, 2, sampler=order, num_workers=num_workers)


def epoch(source: ResumableLoader, number: int) -> Iterator[list[int]]:
    source.sampler.set_epoch(number)  # type: ignore[attr-defined]  # as Lightning does before each epoch
    return (batch["input_ids"].flatten().tolist() for batch in source)


def windows(batches: Iterator[list[int]]) -> list[int]:
    return [window for batch in batches for window in batch]


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_resumed_epoch_goes_on_with_the_next_batch(processes: int, rank: int) -> None:
    straight = loader(processes, rank)
    expected = [list(epoch(straight, number)) for number in range(3)]
    for stop in range(len(straight)):
        for number in range(2):
            stopped = loader(processes, rank)
            given = list(islice(epoch(stopped, number), stop))
            resumed = loader(processes, rank)
            resumed.load_state_dict(stopped.state_dict())
            assert given + list(epoch(resumed, number)) == expected[number]
            assert list(epoch(resumed, number + 1)) == expected[number + 1]  # whole again


def test_every_epoch_has_an_order_of_its_own_and_all_windows() -> None:
    source = loader()
    first, second = windows(epoch(source, 0)), windows(epoch(source, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(11))


def test_processes_share_an_epoch_out() -> None:
    shares = [windows(epoch(loader(2, rank), 0)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 6  # one window twice, so that both take as many steps
    assert set(shares[0]) | set(shares[1]) == set(range(11))


def test_after_the_last_batch_the_next_epoch_is_whole() -> None:
    source = loader()
    batches = epoch(source, 0)
    for _ in range(len(source)):
        next(batches)  # and no further: a checkpoint is written before the loop asks for one more
    assert source.state_dict() == {"given": 0}


def test_batches_that_workers_hold_ready_are_not_taken_for_given_out() -> None:
    source = loader(num_workers=2)
    batches = epoch(source, 0)
    given = [next(batches), next(batches)]
    assert source.state_dict() == {"given": 2}
    resumed = loader(num_workers=2)
    resumed.load_state_dict(source.state_dict())
    assert given + list(epoch(resumed, 0)) == list(epoch(loader(), 0))
