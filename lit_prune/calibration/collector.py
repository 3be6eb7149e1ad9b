"""Hooks that collect the statistics of layers' inputs while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import NumericalError
from lit_prune.models.experts import Experts
from lit_prune.ops import LayerStats, collectives
from lit_prune.ops.precision import working
from lit_prune.sharding.parameters import read_weight


class _SeenEnough(Exception):  # noqa: N818 - a signal, not an error
    """Ends a block's forward pass when no layer is watched any more."""


class Collector:
    """Forward pre-hooks that add each layer's inputs to its statistics, once per distinct input tensor."""

    def __init__(self, needs: frozenset[str], whole_passes: bool = True) -> None:
        """Collect what ``needs`` names.

        Args:
            needs: of what a ``LayerStats`` can collect.
            whole_passes: off if the block's outputs are not needed: a pass then ends with the layer that was the last
                one on the first batch, if every layer was called once. The last layer is a quarter of a block's work.
        """
        self.stats: dict[str, LayerStats] = {}
        self.sequences = 0
        self.dense_inputs: dict[str, Tensor] = {}
        """This batch's inputs of every layer in the dense model, if they are wanted."""
        self._needs = needs
        self._whole_passes = whole_passes
        self._called: list[str] = []  # on this batch, in order
        self._last: str | None = None
        self._owners: dict[str, str] = {}  # layer -> the layer whose hook feeds the shared statistics
        self._seen: list[tuple[Tensor, str]] = []  # this batch's inputs, alive so that identity means identity

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Add the inputs of every call of these layers, by name, in one batch's pass in this context."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in layers.items()]
        try:
            with suppress(_SeenEnough):
                yield
        finally:
            for handle in handles:
                handle.remove()
        if not self._whole_passes and sorted(self._called) == sorted(layers):
            self._last = self._called[-1]
        self._called.clear()
        self._seen.clear()
        self.dense_inputs.clear()

    def from_all_processes(self, layers: Mapping[str, nn.Module], compared: Container[str]) -> dict[str, LayerStats]:
        """Return the statistics of every layer, by name, that was called in any process, added up over all.

        Args:
            layers: all that were watched.
            compared: the names of those that had ``dense_inputs``.
        """
        owners = {name: owner for found in reversed(collectives.gather(self._owners)) for name, owner in found.items()}
        if collectives.world_size() > 1:
            for owner in [name for name in layers if owners.get(name) == name]:
                weight = working(read_weight(layers[owner]))
                mine = self.stats.setdefault(owner, LayerStats(self._needs))
                mine.add_processes(weight.new_zeros(weight.shape[1]), owner in compared)
        return {name: self.stats[owner] for name, owner in owners.items()}

    def sharing(self) -> list[list[str]]:
        """Return the names of layers by the input that they share."""
        groups: dict[str, list[str]] = {}
        for name, owner in self._owners.items():
            groups.setdefault(owner, []).append(name)
        return list(groups.values())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._add(name, args[0])
            self._called.append(name)
            if name == self._last:
                raise _SeenEnough

        return hook

    def _add(self, name: str, inputs: Tensor) -> None:
        owner = next((seen_by for tensor, seen_by in self._seen if tensor is inputs), name)
        if owner != name and self._owners.setdefault(name, owner) == owner:
            self.stats[name] = self.stats[owner]
            return
        if self._owners.setdefault(name, name) != name:
            raise NumericalError(f"{name} shared its input with {self._owners[name]} on one batch but not on another")
        self._seen.append((inputs, name))
        with torch.autocast(inputs.device.type, enabled=False):  # statistics are summed in float32 all the same
            stats = self.stats.setdefault(name, LayerStats(self._needs))
            stats.update(inputs, self.sequences, self.dense_inputs.get(name))


def expert_layers(block: nn.Module) -> list[list[nn.Linear]]:
    """Return the experts' layers that stand at the same place of different experts, a list for each place."""
    return [
        list(layers)
        for module in block.modules()
        if isinstance(module, Experts)
        for layers in zip(*(expert.children() for expert in module), strict=True)
    ]


@contextmanager
def inputs_kept(layers: Mapping[str, nn.Module], inputs: dict[str, Tensor]) -> Iterator[None]:
    """Keep what each layer is called with in ``inputs``."""

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0]

        return keep

    handles = [module.register_forward_pre_hook(keeper(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
