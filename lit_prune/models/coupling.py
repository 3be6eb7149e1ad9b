"""Coupled units of a block: the rows of layers and the columns of another one that can only be removed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_prune.models.targets import Target
from lit_prune.ops.structured import Unit

Reach = dict[str, Tensor]
"""Which inputs of other layers depend on the outputs of a layer: pairs of an output and an input, ``[2, pairs]`` int64,
by the name of the other layer."""


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of its weight ``[o, i]``."""

    rows: Tensor | None = None
    """Indices of the kept rows, ascending; None = all."""
    columns: Tensor | None = None
    """Indices of the kept columns, ascending; None = all."""

    def of(self, matrix: Tensor) -> Tensor:
        """Return the kept part of a matrix ``[o, i]``."""
        matrix = matrix if self.rows is None else matrix[self.rows.to(matrix.device)]
        return matrix if self.columns is None else matrix[:, self.columns.to(matrix.device)]

    def shape_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the kept part of a matrix of a shape ``[o, i]``."""
        rows = shape[0] if self.rows is None else len(self.rows)
        return rows, shape[1] if self.columns is None else len(self.columns)

    def mask(self, shape: tuple[int, int]) -> Tensor:
        """Return the keep mask of a weight of a shape ``[o, i]``."""
        keep = torch.zeros(shape, dtype=torch.bool)
        rows = torch.arange(shape[0]) if self.rows is None else self.rows
        keep[rows[:, None], torch.arange(shape[1]) if self.columns is None else self.columns] = True
        return keep


@dataclass(frozen=True)
class Producer:
    """A layer whose rows belong to units."""

    target: Target
    rows: Tensor
    """Rows of its weight, ``[units, rows per unit]`` int64."""


@dataclass(frozen=True)
class Coupling:
    """The units of one layer, the consumer: its columns, and the rows of the layers that produce what it reads."""

    consumer: Target
    columns: Tensor
    """Columns of the consumer's weight, ``[units, columns per unit]`` int64."""
    producers: tuple[Producer, ...]

    @property
    def kind(self) -> Unit:
        """Kind of the units: channels if a unit has a single column, else heads."""
        return "channels" if self.columns.shape[1] == 1 else "heads"

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.columns)

    @cached_property
    def unit_size(self) -> int:
        """Number of weights of a unit."""
        own = self.columns.shape[1] * self.consumer.shape[0]
        return own + sum(p.rows.shape[1] * p.target.shape[1] for p in self.producers)

    @property
    def targets(self) -> Iterator[Target]:
        """The consumer and the producers."""
        yield self.consumer
        yield from (producer.target for producer in self.producers)

    def keep(self, units: Tensor) -> dict[str, Kept]:
        """Return what every layer keeps, by its name, given the kept ``units`` ``[units]`` (bool)."""
        kept = {p.target.name: Kept(rows=p.rows[units].flatten().sort().values) for p in self.producers}
        return {self.consumer.name: Kept(columns=self.columns[units].flatten().sort().values), **kept}


def couple(reach: Mapping[str, Reach], targets: Mapping[str, Target]) -> list[Coupling]:
    """Return the couplings of a block with at least two units, from what its layers reach.

    A producer reaches a single layer, and not the block's output. The units are the connected components of the graph
    of its outputs and that layer's inputs: a channel of an MLP, or all queries, keys and values of a key-value head.

    Args:
        reach: what each layer reaches, by its name; the block's output has the name ``""``.
        targets: layers of the block by name.
    """
    producers: dict[str, list[str]] = {}
    for name, reached in reach.items():
        if len(reached) == 1 and (consumer := next(iter(reached))):
            producers.setdefault(consumer, []).append(name)
    found = []
    for consumer, names in producers.items():
        edges = [reach[name][consumer] for name in names]
        shapes = [targets[name].shape for name in names]
        columns, rows = _components(edges, [outputs for outputs, _ in shapes], targets[consumer].shape[1])
        if columns is not None and len(columns) > 1:
            parts = tuple(Producer(targets[name], of_one) for name, of_one in zip(names, rows, strict=True))
            found.append(Coupling(targets[consumer], columns, parts))
    return found


def _components(edges: Sequence[Tensor], outputs: Sequence[int], inputs: int) -> tuple[Tensor | None, list[Tensor]]:
    """Return the columns ``[units, c]`` and the rows ``[units, r]`` of every producer of the connected components.

    The columns are None if components differ in size, or if an input or an output belongs to none.
    """
    labels = torch.arange(inputs)
    while True:
        before = labels.clone()
        of_rows = [
            torch.full((count,), inputs).scatter_reduce(0, pairs[0], labels[pairs[1]], "amin")
            for pairs, count in zip(edges, outputs, strict=True)
        ]
        for pairs, of_row in zip(edges, of_rows, strict=True):
            labels = labels.scatter_reduce(0, pairs[1], of_row[pairs[0]], "amin")
        if torch.equal(labels, before):
            break
    units = labels.unique()
    groups = [_grouped(values, units) for values in (labels, *of_rows)]
    if any(group is None for group in groups):
        return None, []
    columns, *rows = [group for group in groups if group is not None]
    return columns, rows


def _grouped(labels: Tensor, units: Tensor) -> Tensor | None:
    """Return the positions of every label in ``units``, ``[units, n]``; None if the labels differ in number."""
    order = labels.argsort(stable=True)
    if len(labels) % len(units):
        return None
    positions = order.reshape(len(units), -1)
    return positions if torch.equal(labels[positions], units[:, None].expand_as(positions)) else None
