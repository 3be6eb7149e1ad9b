"""The units that a structured pattern removes: which layers they consist of, and how many go from each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import nn

from lit_prune.allocators import Uniform
from lit_prune.calibration.block_inputs import Recorder
from lit_prune.calibration.dependencies import find_couplings
from lit_prune.errors import InputError, first_line
from lit_prune.models.blocks import Block
from lit_prune.models.coupling import Coupling, Kept
from lit_prune.models.shrink import smaller_config
from lit_prune.models.targets import Target
from lit_prune.models.widths import narrow
from lit_prune.ops.structured import Structured
from lit_prune.pruning.plan import PruningPlan
from lit_prune.sharding.block_store import BlockStore


@dataclass(frozen=True)
class Units:
    """All units of a model that a plan may remove."""

    pattern: Structured
    couplings: tuple[Coupling, ...]
    targets: tuple[Target, ...]
    """The layers that units consist of, in model order; all layers if blocks may be removed."""

    @cached_property
    def by_consumer(self) -> dict[str, Coupling]:
        """The couplings by the name of the layer that reads the units."""
        return {coupling.consumer.name: coupling for coupling in self.couplings}

    def only(self, pattern: Structured) -> Units:
        """Return the units of the kinds that another pattern removes."""
        return replace(self, pattern=pattern, couplings=tuple(c for c in self.couplings if c.kind in pattern.units))

    def removed_blocks(self, allocation: Mapping[str, float]) -> list[int]:
        """Return the indices of the blocks to remove entirely, all of whose layers have a sparsity of 1."""
        if "blocks" not in self.pattern.units:
            return []
        left = {target.block for target in self.targets if allocation[target.name] < 1}
        return sorted({target.block for target in self.targets} - left)

    def patterns(self, allocation: Mapping[str, float], part: float = 1.0) -> dict[str, Structured]:
        """Return the pattern of every layer that reads units, by its name, except in blocks that are removed.

        Args:
            allocation: sparsity of every layer of the units, by name; a unit has that of its layers on average,
                weighted by their numbers of weights.
            part: fraction of the units to remove so far, in [0, 1], on the way to the allocation. Every layer gets its
                part, so that no unit has to come back later.
        """
        gone = self.removed_blocks(allocation)
        counts = self._counts(allocation, [c for c in self.couplings if c.consumer.block not in gone])
        found = {}
        for name, count in counts.items():
            coupling = self.by_consumer[name]
            found[name] = self.pattern.of_layer(coupling.columns, self._rounded(coupling, part * count))
        return found

    def _counts(self, allocation: Mapping[str, float], couplings: Sequence[Coupling]) -> dict[str, int]:
        """Return the number of units of couplings to remove, by the name of the consumer.

        In every block, the weights that go are those of the allocation to within one unit: the largest units are
        counted first, and smaller ones make up for their rounding.

        Raises:
            InputError: if more would have to go than units that can be spared.
        """
        counts: dict[str, int] = {}
        for _, block in groupby(couplings, key=lambda coupling: coupling.consumer.block):
            missing = 0.0  # weights that larger units should have removed in addition
            for _, group in groupby(sorted(block, key=_size), key=_size):
                alike = list(group)
                missing /= len(alike)
                lost = [self._count(each, allocation, missing) for each in alike]
                counts |= {each.consumer.name: count for each, (count, _) in zip(alike, lost, strict=True)}
                missing = sum(rest for _, rest in lost)
            smallest = alike[-1]
            if missing > len(alike) * _step(self.pattern, smallest) * smallest.unit_size / 2:
                raise InputError(
                    f"plan.pattern.sparsity {self.pattern.sparsity:g} would leave no {smallest.kind} of the "
                    f"{smallest.units} of {smallest.consumer.name}: lower it"
                )
        return counts

    def _count(self, coupling: Coupling, allocation: Mapping[str, float], more: float) -> tuple[int, float]:
        """Return the number of units to remove, and the number of weights that this is too few (or too many, if < 0).

        Args:
            coupling: the units.
            allocation: as for ``patterns``.
            more: number of weights to remove in addition to the allocation.
        """
        wanted = more + sum(allocation[target.name] * _numel(target) for target in coupling.targets)
        count = self._rounded(coupling, wanted / coupling.unit_size)
        return count, wanted - count * coupling.unit_size

    def _rounded(self, coupling: Coupling, removed: float) -> int:
        """Return a number of units to remove that leaves a permitted number, closest to the given one."""
        step = _step(self.pattern, coupling)
        kept = round((coupling.units - removed) / step) * step
        return coupling.units - max(min(step, coupling.units), min(kept, coupling.units))

    def check(self, model: nn.Module, allocation: Mapping[str, float], uneven: bool) -> None:
        """Raise ``InputError`` if no unit would remain of a layer, or the smaller model cannot be written."""
        for coupling in self.couplings:
            if _step(self.pattern, coupling) > coupling.units:
                raise InputError(
                    f"plan.pattern.round_to is {self.pattern.round_to}, and {coupling.consumer.name} has "
                    f"{coupling.units} channels: lower it"
                )
        kept: dict[str, Kept] = {}
        for name, pattern in self.patterns(allocation).items():
            coupling = self.by_consumer[name]
            kept |= coupling.keep(torch.arange(coupling.units) >= pattern.removed(coupling.units))
        smaller_config(model, kept, self.removed_blocks(allocation), uneven)


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
    kinds = {coupling.kind for coupling in found}
    if lacking := [unit for unit in pattern.units if unit not in kinds and unit != "blocks"]:
        raise InputError(
            f"plan.pattern.units has {lacking[0]}, and {type(model).__name__} has none that can be removed without the "
            "others: norms or other layers mix them; leave them out"
        )
    members = {target.name: coupling for coupling in found for target in coupling.targets}
    described = [
        replace(target, unit=c.kind, units=c.units, step=_step(pattern, c))
        if (c := members.get(target.name))
        else target
        for target in targets
    ]
    units = Units(pattern, tuple(found), tuple(t for t in described if t.unit or plan.removes_blocks))
    units.check(model, dict.fromkeys(names, pattern.sparsity), uneven=is_uneven(plan))
    if is_uneven(plan):
        _check_uneven(model, blocks, found, store)
    return units


@torch.no_grad()
def narrower(block: Block, couplings: Sequence[Coupling]) -> tuple[nn.Module, float]:
    """Return a copy of a block without half of the units of some of its couplings, and the fraction that is gone."""
    copied, removed = copy.deepcopy(block.module), 0
    for coupling in couplings:
        kept = coupling.keep(torch.arange(coupling.units) >= coupling.units // 2)
        shapes = {target.name: kept[target.name].shape_of(target.shape) for target in coupling.targets}
        narrow(copied, {name.removeprefix(f"{block.name}."): shape for name, shape in shapes.items()})
        removed += coupling.units // 2 * coupling.unit_size
    return copied, removed / sum(coupling.units * coupling.unit_size for coupling in couplings)


def _check_uneven(model: nn.Module, blocks: Sequence[Block], found: Sequence[Coupling], store: BlockStore) -> None:
    """Raise ``InputError`` if a block does not run with fewer heads than the config says."""
    heads = [coupling for coupling in found if coupling.kind == "heads"]
    if not heads:
        return
    block = blocks[heads[0].consumer.block]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    hidden, calls = Recorder(model, blocks, store).record({"input_ids": ids})
    with store.resident(block):
        copied, _ = narrower(block, [coupling for coupling in heads if coupling.consumer.block == block.index])
        try:
            copied(hidden, *calls[block.index].args, **calls[block.index].kwargs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"plan.pattern.units has heads, and {type(model).__name__} needs as many in every block "
                f"({first_line(error)}): leave them out, or use the allocator Uniform"
            ) from error


def is_uneven(plan: PruningPlan) -> bool:
    """Return whether a structured plan may leave other widths in every block."""
    return not isinstance(plan.allocator, Uniform)


def _step(pattern: Structured, coupling: Coupling) -> int:
    """Return the number that the number of kept units is a multiple of."""
    return pattern.round_to if coupling.kind == "channels" else 1


def _size(coupling: Coupling) -> tuple[int, int]:
    """Return the key by which couplings are ordered: the largest units first."""
    return -coupling.unit_size, coupling.units


def _numel(target: Target) -> int:
    outputs, inputs = target.shape
    return outputs * inputs
