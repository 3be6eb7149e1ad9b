"""Collective operations of torch.distributed; no-ops on a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks, in place."""
    if world_size() > 1:
        sent = tensor.to(_device(tensor))
        distributed.all_reduce(sent)
        if sent is not tensor:
            tensor.copy_(sent)
    return tensor


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """Overwrite ``tensor`` on every rank by that of the rank ``owner``."""
    if world_size() > 1:
        sent = tensor.to(_device(tensor)).contiguous()
        distributed.broadcast(sent, owner)
        if sent is not tensor:
            tensor.copy_(sent)
    return tensor


def gather(value: Result) -> list[Result]:
    """Return the ``value`` of every rank, any object that pickles, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def raise_first(values: Sequence[Exception | None]) -> None:
    """Re-raise the first error on every rank, so that none hangs; None stands for success."""
    for value in values:
        if value is not None:
            raise value


def on_first_rank(make: Callable[[], Result]) -> Result:
    """Call ``make`` on rank 0, and return its result or raise its error on every rank."""
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, 0)
    raise_first(outcome[1:])
    return cast(Result, outcome[0])


def partition(costs: Sequence[float]) -> list[int]:
    """Assign pieces of work to ranks, the costliest first, each to the rank with the least work so far.

    >>> partition([3.0, 5.0, 2.0])  # one process
    [0, 0, 0]
    """
    loads, owners = [0.0] * world_size(), [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _device(tensor: Tensor) -> torch.device:
    """Return the device that the backend communicates from."""
    if distributed.get_backend() == "nccl" and tensor.device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device if distributed.get_backend() == "nccl" else torch.device("cpu")
