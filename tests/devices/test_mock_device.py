"""The mock device finds what would fail, or be slow, on a GPU: each mistake is planted here."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support.mock_device import MOCK, HostReads, host_reads

OTHER = "Expected all tensors to be on the same device"
WAITS = "the host waits for the device here"


def weight() -> Tensor:
    return torch.arange(24.0, device=MOCK).reshape(4, 6) - 10


def on_cpu() -> Tensor:
    return torch.ones(4, 6)


def mask_on_cpu() -> Tensor:
    return torch.ones(4, 6, dtype=torch.bool)


def assign(value: Tensor) -> None:
    weight()[mask_on_cpu()] = value


MIXED: dict[str, Callable[[], object]] = {
    "sum": lambda: weight() + on_cpu(),
    "sum in place": lambda: weight().add_(on_cpu()),
    "sum in place on the CPU": lambda: on_cpu().add_(weight()),
    "product": lambda: weight() @ on_cpu().T,
    "linear layer": lambda: nn.Linear(6, 2)(weight()),
    "concatenation": lambda: torch.cat([weight(), on_cpu()]),
    "mask as an index": lambda: weight()[mask_on_cpu()],
    "mask as an index of an assignment": lambda: assign(torch.zeros((), device=MOCK)),
    "indices": lambda: weight()[torch.tensor([0, 2])],
    "where": lambda: torch.where(mask_on_cpu(), weight(), 0.0),
    "where between two": lambda: torch.where(weight() > 0, weight(), on_cpu()),
    "filling by a mask": lambda: weight().masked_fill(mask_on_cpu(), 0.0),
    "selection by a mask": lambda: weight().masked_select(mask_on_cpu()),
    "scattering": lambda: weight().scatter_(1, torch.zeros(4, 1, dtype=torch.long), 1.0),
    "gathering": lambda: weight().gather(1, torch.zeros(4, 1, dtype=torch.long)),
    "embedding": lambda: nn.functional.embedding(torch.tensor([1]), weight()),
    "generator": lambda: torch.rand(3, device=MOCK, generator=torch.Generator()),
}


@pytest.mark.parametrize("operation", MIXED)
def test_tensors_of_two_devices_are_refused(operation: str) -> None:
    with pytest.raises(RuntimeError, match=f"{OTHER}|device type for generator"):
        MIXED[operation]()


def test_numbers_of_the_cpu_are_taken_as_on_a_gpu() -> None:
    total = (weight() * torch.tensor(2.0)).where(weight() > 0, torch.tensor(0.0)).sum()
    assert total.item() == 2 * sum(range(14))


class Shifts(nn.Module):
    """A layer that adds a tensor, which ``to`` moves if it is a buffer."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        if registered:
            self.register_buffer("shift", torch.ones(6))
        else:
            self.shift = torch.ones(6)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.shift


def test_a_tensor_that_does_not_move_with_its_module_is_found() -> None:
    assert Shifts(registered=True).to(MOCK)(weight()).device.type == MOCK
    missed = copy.deepcopy(Shifts(registered=False)).to(MOCK)
    with pytest.raises(RuntimeError, match=OTHER):
        missed(weight())


def test_the_host_cannot_follow_an_address_of_the_device() -> None:
    with pytest.raises((RuntimeError, TypeError)):
        weight().numpy()


READS: dict[str, Callable[[], object]] = {
    "item": lambda: weight().sum().item(),
    "bool": lambda: bool((weight() > 0).any()),
    "float": lambda: float(weight().max()),
    "tolist": lambda: weight().tolist(),
    "copy": lambda: weight().cpu(),
    "nonzero": lambda: weight().nonzero(),
    "index by a mask": lambda: weight()[weight() > 0],
    "unique": lambda: weight().unique(),
    "equal": lambda: torch.equal(weight(), weight()),
    "repeats on the device": lambda: weight().repeat_interleave(torch.ones(6, dtype=torch.long, device=MOCK), 1),
}


@pytest.mark.parametrize("operation", READS)
def test_what_makes_the_host_wait_is_counted_or_refused(operation: str) -> None:
    with host_reads() as found:
        READS[operation]()
    assert found.total() >= 1
    with host_reads(refuse=True), pytest.raises(RuntimeError, match=WAITS):
        READS[operation]()


def test_what_does_not_make_it_wait_is_not_counted() -> None:
    with host_reads(refuse=True) as found:
        a = weight().masked_fill_(weight() > 3, 0.0)
        a[1:3, ::2] = torch.tensor(1.0)
        a.index_add_(0, torch.zeros(4, dtype=torch.long, device=MOCK), weight())
        torch.where(a > 0, a, weight()).sort(dim=1).values.cumsum(0).to(torch.bfloat16)
        on_cpu().to(MOCK)
    assert found == HostReads()
