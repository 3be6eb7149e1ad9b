"""Several processes as one: what torch.distributed was set up for is used, and one process alone needs none of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

Result = TypeVar("Result")


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def add_up(tensor: Tensor) -> Tensor:
    """Add what the other processes have to ``tensor``, in place; every process must call it."""
    if count() > 1:
        sent = tensor.to(_device(tensor))
        distributed.all_reduce(sent)
        if sent is not tensor:
            tensor.copy_(sent)
    return tensor


def hand_out(tensor: Tensor, owner: int) -> Tensor:
    """Overwrite ``tensor`` in every process by the owner's; every process must call it."""
    if count() > 1:
        sent = tensor.to(_device(tensor)).contiguous()
        distributed.broadcast(sent, owner)
        if sent is not tensor:
            tensor.copy_(sent)
    return tensor


def gathered(value: Result) -> list[Result]:
    """Return every process's ``value``, any object, in the order of the processes."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def everywhere(values: Sequence[Exception | None]) -> None:
    """Raise the first of the processes' exceptions, if there is any, so that none waits for one that has failed."""
    for value in values:
        if value is not None:
            raise value


def from_first(make: Callable[[], Result]) -> Result:
    """Return in every process what ``make`` returns, or raise what it raises, in the first one."""
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, 0)
    everywhere(outcome[1:])
    return cast(Result, outcome[0])


def dealt(costs: Sequence[float]) -> list[int]:
    """Return the process that each piece of work goes to: the costliest first, each to whom has the least so far.

    >>> dealt([3.0, 5.0, 2.0])  # one process
    [0, 0, 0]
    """
    loads, owners = [0.0] * count(), [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _device(tensor: Tensor) -> torch.device:
    """Return where collective operations take tensors: on GPUs where NCCL is all there is."""
    if distributed.get_backend() == "nccl" and tensor.device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device if distributed.get_backend() == "nccl" else torch.device("cpu")
