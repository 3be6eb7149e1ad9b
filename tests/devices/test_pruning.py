"""Pruning on a device gives what it gives on the CPU, and asks the device no more often for wider layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lit_prune import allocators, scorers, solvers
from lit_prune.allocators import OWL, AlphaPruning, Measured
from lit_prune.models.load import load_model
from lit_prune.ops import NM, LayerStats, Pattern, Structured, Unstructured
from lit_prune.pruning import PruningPlan, Quantize, Reconstruction, prune
from lit_prune.scorers import GBLM, Scorer, Wanda
from lit_prune.solvers import ADMM, Solver, SparseGPT, Zero
from lit_prune.solvers.base import Solution
from support.mock_device import MOCK, HostReads, host_reads
from support.rounding import distance
from support.training import LLAMA

PATTERNS: dict[str, Pattern] = {
    "matrix": Unstructured(0.5, "matrix"),
    "row": Unstructured(0.3, "row"),
    "2:4": NM(2, 4),
    "structured": Structured(0.25),
}
METHODS: dict[str, tuple[type[Scorer] | None, type[Solver]]] = {
    **{name: (scorer, Zero) for name, scorer in scorers.METHODS.items()},
    **{name: (None, solver) for name, solver in solvers.METHODS.items() if not solver.needs_score},
    "Wanda and SparseGPT": (Wanda, SparseGPT),
    "Wanda and ADMM": (Wanda, ADMM),
}
UNSTRUCTURED = PATTERNS["matrix"]


def as_plan(method: str, pattern: str) -> PruningPlan:
    scorer, solver = METHODS[method]
    return PruningPlan(PATTERNS[pattern], scorer() if scorer else None, solver=solver())


PLANS = {f"{m} {p}": as_plan(m, p) for m, p in product(METHODS, PATTERNS)}
PLANS |= {
    **{
        f"allocator {name}": PruningPlan(UNSTRUCTURED, Wanda(), allocator())
        for name, allocator in allocators.METHODS.items()
        if name not in ("FromFile", "Uniform")
    },
    "allocator with mixed N:M": PruningPlan(NM(2, 4), Wanda(), OWL()),
    "allocator of windows": PruningPlan(UNSTRUCTURED, Wanda(), AlphaPruning(windows=True, mapping="mixed")),
    "allocator behind another": PruningPlan(UNSTRUCTURED, Wanda(), Measured(prior=OWL())),
    "corrections": PruningPlan(UNSTRUCTURED, solver=SparseGPT(), correction=0.3, residual_correction=0.4),
    "corrections, structured": PruningPlan(PATTERNS["structured"], solver=SparseGPT(), correction=0.3),
    "sequential": PruningPlan(UNSTRUCTURED, solver=ADMM(), correction=0.3, sequential=True),
    "not sequential": PruningPlan(UNSTRUCTURED, solver=ADMM(), correction=0.3, sequential=False),
    "dense propagation": PruningPlan(UNSTRUCTURED, Wanda(), propagate="dense"),
    "8 bits": PruningPlan(UNSTRUCTURED, Wanda(), quantize=Quantize(8)),
    "4 bits": PruningPlan(UNSTRUCTURED, solver=SparseGPT(), quantize=Quantize(4)),
    "4 bits, dense": PruningPlan(Unstructured(0.0), Wanda(), quantize=Quantize(4)),
    "4 bits, 2:4": PruningPlan(NM(2, 4), Wanda(), quantize=Quantize(4), sequential=False),
    "gradients with alpha auto": PruningPlan(UNSTRUCTURED, GBLM(alpha="auto")),
    "reconstruction": PruningPlan(UNSTRUCTURED, Wanda(), reconstruction=Reconstruction(steps=2)),
    "heads": PruningPlan(Structured(0.25, units=("channels", "heads"), round_to=1), Wanda()),
    "blocks": PruningPlan(Structured(0.5, units=("blocks",)), Wanda()),
}


@cache
def dense(width: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32 * width, "intermediate_size": 48 * width}
    return load_model("random", config={**LLAMA, **sizes}).double()


def model(width: int = 1) -> nn.Module:
    return copy.deepcopy(dense(width))


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (2, 12), generator=generator) for _ in range(2)]


@cache
def on_the_cpu(name: str) -> nn.Module:
    expected = model()
    prune(expected, tokens(), PLANS[name])
    return expected


def check_pruned(name: str, pruned: nn.Module) -> None:
    """Compare weights with those of the CPU, in float64, where only another choice is more than rounding.

    SparseGPT adds a hundredth of the mean of the Gram matrix's diagonal, so that its condition is at most a hundred
    times the number of inputs; other methods add more, or invert nothing. Every layer inherits the errors of those in
    front of it.
    """
    bound = len(list(pruned.modules())) * 100 * LLAMA["intermediate_size"] * torch.finfo(torch.float64).eps
    for (key, actual), expected in zip(pruned.named_parameters(), on_the_cpu(name).parameters(), strict=True):
        assert torch.equal(actual.cpu() == 0, expected == 0), f"{key}: another mask"
        assert distance(actual.cpu(), expected) <= bound, key


@pytest.mark.parametrize("name", PLANS)
def test_a_model_on_the_device(name: str) -> None:
    pruned = model().to(MOCK)
    report = prune(pruned, tokens(), PLANS[name])
    assert {parameter.device.type for parameter in pruned.parameters()} == {MOCK}
    assert report.masks or "blocks" in name
    check_pruned(name, pruned)


VISITING = [name for name in PLANS if " and " not in name or name.endswith("matrix")]


@pytest.mark.parametrize("name", VISITING)
def test_a_model_on_the_cpu_whose_blocks_visit_the_device(name: str) -> None:
    pruned = model()
    with host_reads() as found:
        prune(pruned, tokens(), replace(PLANS[name], device=MOCK, hidden_device="cpu"))
    assert found, "nothing was computed on the device"
    assert {parameter.device.type for parameter in pruned.parameters()} == {"cpu"}
    check_pruned(name, pruned)


def test_allocation_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "allocation.json").write_text(json.dumps({"*": 0.5}))
    plan = PruningPlan(UNSTRUCTURED, Wanda(), allocators.METHODS["FromFile"](path=str(tmp_path / "allocation.json")))
    pruned = model().to(MOCK)
    prune(pruned, tokens(), plan)
    check_pruned("Wanda matrix", pruned)


# Questions to the device.


def reads(plan: PruningPlan, width: int) -> HostReads:
    """Return the host's waits while a model ``width`` times as wide is pruned."""
    pruned = model(width).to(MOCK)
    with host_reads() as found:
        prune(pruned, tokens(), plan)
    return found


def growing(plan: PruningPlan) -> dict[str, tuple[int, int]]:
    """Return the lines that wait more often in a wider model, and how often in either."""
    narrow, wide = reads(plan, 1), reads(plan, 2)
    return {line: (narrow[line], count) for line, count in wide.items() if count > narrow[line]}


FAST = {
    **{f"{method} {pattern}": as_plan(method, pattern) for method in ("SparseGPT", "ADMM") for pattern in PATTERNS},
    "Wanda": as_plan("Wanda", "matrix"),
    "Wanda structured": as_plan("Wanda", "structured"),
    "4 bits": PruningPlan(UNSTRUCTURED, Wanda(), quantize=Quantize(4)),
}


@pytest.mark.parametrize("name", FAST)
def test_wider_layers_ask_the_device_no_more_often(name: str) -> None:
    assert growing(FAST[name]) == {}


# Planted mistakes, in methods that are correct on the CPU.


@dataclass(frozen=True)
class AddsOfTheCpu(Scorer):
    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return weight.abs() + torch.linspace(0, 1e-3, weight.shape[1])


@dataclass(frozen=True)
class MasksOfTheCpu(Solver):
    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        keep = pattern.mask(weight.abs().cpu())
        return Solution(torch.where(keep, weight, 0.0), keep)


@dataclass(frozen=True)
class AsksForEveryRow(Solver):
    def solve(
        self,
        weight: Tensor,
        stats: LayerStats,
        pattern: Pattern,
        score: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Solution:
        keep = pattern.mask(weight.abs())
        pruned = weight * keep
        for row in range(len(weight)):
            if keep[row].sum().item() == 0:
                raise ValueError(row)
        return Solution(pruned, keep)


MISTAKES: dict[str, PruningPlan] = {
    "sum with a tensor of the CPU": PruningPlan(UNSTRUCTURED, AddsOfTheCpu()),
    "mask of the CPU": PruningPlan(UNSTRUCTURED, solver=MasksOfTheCpu()),
}
PLACES: dict[str, Callable[[PruningPlan], object]] = {
    "on the device": lambda plan: prune(model().to(MOCK), tokens(), plan),
    "visiting it": lambda plan: prune(model(), tokens(), replace(plan, device=MOCK, hidden_device="cpu")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, place: str) -> None:
    prune(model(), tokens(), MISTAKES[mistake])  # no mistake on the CPU
    with pytest.raises(RuntimeError, match="same device"):
        PLACES[place](MISTAKES[mistake])


def test_a_question_for_every_row_is_found() -> None:
    found = growing(PruningPlan(UNSTRUCTURED, solver=AsksForEveryRow()))
    assert sum(wide - narrow for narrow, wide in found.values()) >= 2 * 32
