"""Forward hooks that collect the statistics of layers' inputs while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lit_prune.errors import NumericalError
from lit_prune.models.experts import Experts
from lit_prune.ops import LayerStats, collectives
from lit_prune.ops.precision import working
from lit_prune.sharding.parameters import read_weight


class _SeenEnough(Exception):  # noqa: N818 - a signal, not an error
    """Stops a block's forward pass when the last watched layer has been called."""


Seen = list[tuple["ref[Tensor]", str]]
"""Inputs on one batch, as far as they still exist, with the layer whose statistics they belong to."""


class Collector:
    """Forward pre-hooks that accumulate the statistics of each layer's inputs, once per distinct input tensor."""

    def __init__(self, needs: frozenset[str], whole_passes: bool = True) -> None:
        """Initialize empty statistics.

        Args:
            needs: statistics to collect, as for ``LayerStats``.
            whole_passes: False if the block's outputs are not needed: a pass then ends before the layer that was called
                last on the first batch, if every layer was called once. The last layer is a quarter of a block's work.
        """
        self.stats: dict[str, LayerStats] = {}
        self.sequences = 0
        self.dense_inputs: dict[str, Tensor] = {}
        """Inputs of every layer in the dense model on this batch, by layer name; empty if not needed."""
        self.output_targets: dict[str, Tensor] = {}
        """Targets of the outputs of layers on this batch, by layer name; see ``LayerStats.update``."""
        self._needs = needs
        self._whole_passes = whole_passes
        self._called: list[str] = []  # layers called on this batch, in order
        self._last: str | None = None
        self._owners: dict[str, str] = {}  # layer -> the layer whose hook feeds the shared statistics
        self._seen: Seen = []

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Accumulate the inputs of these layers, by name, during one batch's pass in this context."""
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

    def from_all_processes(
        self, layers: Mapping[str, nn.Module], compared: Container[str], writers: Container[str] = ()
    ) -> dict[str, LayerStats]:
        """All-reduce and return the statistics of every one of these layers that was called on any process, by name.

        Args:
            layers: watched layers; those that share another layer's statistics come with it, or after it.
            compared: names of the layers with ``dense_inputs``.
            writers: names of the layers with ``output_targets``.
        """
        owners = {name: owner for found in reversed(collectives.gather(self._owners)) for name, owner in found.items()}
        if collectives.world_size() > 1:
            for owner in [name for name in layers if owners.get(name) == name]:
                weight = working(read_weight(layers[owner]))
                mine = self.stats.setdefault(owner, LayerStats(self._needs))
                drifts = {"drift": compared, "output_target": writers}
                collected = [kind for kind, names in drifts.items() if kind in self._needs and owner in names]
                mine.add_processes(weight.new_zeros(weight.shape[1]), len(weight), collected)
        return {name: self.stats[owner] for name, owner in owners.items() if name in layers}

    def forget(self, layers: Iterable[str]) -> None:
        """Free the statistics of layers, which no other layer will share."""
        for name in layers:
            self.stats.pop(name, None)

    def sharing(self) -> list[list[str]]:
        """Return the names of layers, grouped by shared input."""
        groups: dict[str, list[str]] = {}
        for name, owner in self._owners.items():
            groups.setdefault(owner, []).append(name)
        return list(groups.values())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(name, args[0], self._seen)
            self._called.append(name)
            if name == self._last:
                raise _SeenEnough

        return hook

    def add(self, name: str, inputs: Tensor, seen: Seen) -> None:
        """Accumulate the inputs of a layer's call on a batch.

        Args:
            name: name of the layer.
            inputs: its inputs ``[..., i]``.
            seen: inputs of the layers that were called before it on the same batch; these are added.
        """
        # The target of outputs belongs to one layer, so its statistics are not shared.
        alone = name in self.output_targets
        here = (seen_by for tensor, seen_by in seen if tensor() is inputs and seen_by in self.stats)
        owner = name if alone else next(here, name)
        if owner != name and self._owners.setdefault(name, owner) == owner:
            self.stats[name] = self.stats[owner]
            return
        if self._owners.setdefault(name, name) != name:
            raise NumericalError(f"{name} shared its input with {self._owners[name]} on one batch but not on another")
        if not alone:
            seen.append((ref(inputs), name))
        with torch.autocast(inputs.device.type, enabled=False):  # statistics are always summed in float32
            stats = self.stats.setdefault(name, LayerStats(self._needs))
            stats.update(inputs, self.sequences, self.dense_inputs.get(name), self.output_targets.get(name))


def expert_layers(block: nn.Module) -> list[list[nn.Linear]]:
    """Return lists of the corresponding layers of different experts, such as all down projections of a block."""
    return [
        list(layers)
        for module in block.modules()
        if isinstance(module, Experts)
        for layers in zip(*(expert.children() for expert in module), strict=True)
    ]


@contextmanager
def inputs_kept(layers: Mapping[str, nn.Module], inputs: dict[str, Tensor]) -> Iterator[None]:
    """Store the input of each layer's call in ``inputs``, by layer name."""

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
