"""The units that a structured pattern removes: which layers they consist of, and how many go from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import nn

from lit_prune.allocators import Uniform
from lit_prune.calibration.dependencies import find_couplings
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.models.coupling import Coupling, Kept
from lit_prune.models.shrink import smaller_config
from lit_prune.models.targets import Target
from lit_prune.ops.structured import Structured
from lit_prune.pruning.plan import PruningPlan
from lit_prune.sharding.block_store import BlockStore


@dataclass(frozen=True)
class Units:
    """All units of a model that a plan may remove."""

    pattern: Structured
    couplings: tuple[Coupling, ...]

    @cached_property
    def by_consumer(self) -> dict[str, Coupling]:
        """The couplings by the name of the layer that reads the units."""
        return {coupling.consumer.name: coupling for coupling in self.couplings}

    def targets(self, among: Sequence[Target]) -> list[Target]:
        """Return the layers that units consist of, in model order."""
        names = {target.name for coupling in self.couplings for target in coupling.targets}
        return [target for target in among if target.name in names]

    def patterns(self, allocation: Mapping[str, float]) -> dict[str, Structured]:
        """Return the pattern of every layer that reads units, by its name.

        Args:
            allocation: sparsity of every layer of the units, by name; a unit has that of its layers on average,
                weighted by their numbers of weights.
        """
        counts = self._counts(allocation)
        return {name: self.pattern.of_layer(c.columns, counts[name]) for name, c in self.by_consumer.items()}

    def _counts(self, allocation: Mapping[str, float]) -> dict[str, int]:
        """Return the number of units to remove, by the name of the consumer.

        In every block, the weights that go are those of the allocation to within one unit: the largest units are
        counted first, and smaller ones make up for their rounding.

        Raises:
            InputError: if more would have to go than units that can be spared.
        """
        counts: dict[str, int] = {}
        for _, block in groupby(self.couplings, key=lambda coupling: coupling.consumer.block):
            missing = 0.0  # weights that larger units should have removed in addition
            for _, group in groupby(sorted(block, key=_size), key=_size):
                alike = list(group)
                missing /= len(alike)
                lost = [self._count(each, allocation, missing) for each in alike]
                counts |= {each.consumer.name: count for each, (count, _) in zip(alike, lost, strict=True)}
                missing = sum(rest for _, rest in lost)
            smallest = alike[-1]
            if missing > len(alike) * self._step(smallest) * smallest.unit_size / 2:
                raise InputError(
                    f"plan.pattern.sparsity {self.pattern.sparsity:g} would leave no {smallest.kind} of the "
                    f"{smallest.units} of {smallest.consumer.name}: lower it"
                )
        return counts

    def _step(self, coupling: Coupling) -> int:
        """Return the number that the number of kept units is a multiple of."""
        return self.pattern.round_to if coupling.kind == "channels" else 1

    def _count(self, coupling: Coupling, allocation: Mapping[str, float], more: float) -> tuple[int, float]:
        """Return the number of units to remove, and the number of weights that this is too few (or too many, if < 0).

        Args:
            coupling: the units.
            allocation: as for ``patterns``.
            more: number of weights to remove in addition to the allocation.
        """
        wanted = more + sum(allocation[target.name] * _numel(target) for target in coupling.targets)
        step = self._step(coupling)
        least = min(step, coupling.units)
        kept = round((coupling.units - wanted / coupling.unit_size) / step) * step
        kept = max(least, min(kept, coupling.units))
        return coupling.units - kept, wanted - (coupling.units - kept) * coupling.unit_size

    def check(self, model: nn.Module, allocation: Mapping[str, float], uneven: bool) -> None:
        """Raise ``InputError`` if no unit would remain of a layer, or the smaller model cannot be written."""
        for coupling in self.couplings:
            if self._step(coupling) > coupling.units:
                raise InputError(
                    f"plan.pattern.round_to is {self.pattern.round_to}, and {coupling.consumer.name} has "
                    f"{coupling.units} channels: lower it"
                )
        kept: dict[str, Kept] = {}
        for name, pattern in self.patterns(allocation).items():
            coupling = self.by_consumer[name]
            kept |= coupling.keep(torch.arange(coupling.units) >= pattern.removed(coupling.units))
        smaller_config(model, kept, uneven=uneven)


def find_units(
    model: nn.Module, blocks: Sequence[Block], targets: Sequence[Target], plan: PruningPlan, store: BlockStore
) -> Units | None:
    """Return the units that a plan removes; None if its pattern is not structured.

    Raises:
        InputError: if the model has no such units, or ``include`` and ``exclude`` take only a part of a unit's layers.
    """
    pattern = plan.pattern
    if not isinstance(pattern, Structured):
        return None
    names = {target.name for target in targets}
    found = []
    for coupling in find_couplings(model, blocks, store):
        mine = [target.name for target in coupling.targets]
        if coupling.kind not in pattern.units or not names.intersection(mine):
            continue
        if lacking := [name for name in mine if name not in names]:
            raise InputError(
                f"plan.include and plan.exclude take {mine[0]} and not {lacking[0]}: {coupling.kind} are removed from "
                f"both; take all of {', '.join(mine)}, or none"
            )
        found.append(coupling)
    if lacking := [unit for unit in pattern.units if unit not in {coupling.kind for coupling in found}]:
        raise InputError(
            f"plan.pattern.units has {lacking[0]}, and {type(model).__name__} has none that can be removed without the "
            "others: norms or other layers mix them; leave them out"
        )
    units = Units(pattern, tuple(found))
    units.check(model, dict.fromkeys(names, pattern.sparsity), uneven=is_uneven(plan))
    return units


def is_uneven(plan: PruningPlan) -> bool:
    """Return whether a structured plan may leave other widths in every block."""
    return not isinstance(plan.allocator, Uniform)


def _size(coupling: Coupling) -> tuple[int, int]:
    """Return the key by which couplings are ordered: the largest units first."""
    return -coupling.unit_size, coupling.units


def _numel(target: Target) -> int:
    outputs, inputs = target.shape
    return outputs * inputs
