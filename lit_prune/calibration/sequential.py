"""Statistics of a block's layers in the order of its own calls, each behind the layers that are pruned already."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lit_prune.calibration.collector import Collector, Seen, expert_layers
from lit_prune.calibration.replay import BlockReplay
from lit_prune.calibration.residual_stream import residual_writers
from lit_prune.calibration.suspended import REMEDY, SuspendedPasses
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.ops import LayerStats, collectives
from lit_prune.ops.precision import working


class SequentialCalibration:
    """Calibrates the layers of a block one after the other, in a single pass through the block."""

    def __init__(
        self,
        replay: BlockReplay,
        dense: BlockReplay | None = None,
        correction: float = 0.0,
        residual_correction: float = 0.0,
    ) -> None:
        """Keep the replays.

        Args:
            replay: replay positioned before the block, with the hidden states of the model as pruned so far.
            dense: replay positioned before the same block with the dense model's hidden states, for drifts.
            correction: strength of the correction for the drift of inputs; see ``PruningPlan``.
            residual_correction: strength of the correction for the drift of the residual stream.
        """
        self._replay = replay
        self._dense = dense
        self._strengths = correction, residual_correction
        self._sharing: dict[object, list[list[str]]] = {}
        """Groups of layers that shared an input in earlier blocks, by kind of block."""
        self._writers: dict[object, list[str]] = {}
        """Layers that write to the residual stream, by kind of block."""
        self.learning = False
        """Whether a layer may turn out to share the statistics of an earlier stage of the current block."""

    @torch.no_grad()
    def stages(
        self, block: Block, layers: Mapping[str, nn.Module], needs: frozenset[str], advance: bool = True
    ) -> Generator[dict[str, LayerStats]]:
        """Yield the statistics of the layers, stage by stage; the caller prunes a stage before it asks for the next.

        A stage is a layer with those that share its input, as far as earlier blocks have shown, or the corresponding
        layers of all experts.

        Args:
            block: a block that is not pruned yet; both replays are positioned before it.
            layers: layers of the block, by name, in the order of their definition.
            needs: statistics to collect.
            advance: whether the first replay is advanced past the pruned block, in the same pass; the dense one is
                always advanced.

        Raises:
            InputError: if a layer is never called, or the block's pass cannot be suspended.
            NumericalError: if activations are NaN or infinite.
        """
        of_experts = {id(layer) for group in expert_layers(block.module) for layer in group}
        # The dense model routes other tokens to an expert, so its inputs cannot be compared.
        comparable = {name for name, layer in layers.items() if self._dense and id(layer) not in of_experts}
        kind = type(block.module), tuple(name.removeprefix(block.name) for name in layers)
        left = dict(layers)
        self.learning = kind not in self._sharing
        with ExitStack() as stack:
            writers = self._writers_of(block, kind) if self._strengths[1] else {}
            compared = comparable.difference(writers)
            replays = [replay for replay in (self._replay, self._dense) if replay]
            every = [
                stack.enter_context(each.suspended(block.index, layers, writers, behind_writers=each is self._dense))
                for each in replays
            ]
            for each in every:
                each.resume()
            passes = every[0]
            waiting = _Waiting(Collector(needs), replays, every, compared, writers, self._strengths)
            while left:
                stage = _next_stage(passes, left, self._sharing.get(kind, []), block)
                mine = {name: left.pop(name) for name in stage}
                waiting.collect(stage)
                for dense in every[1:]:
                    dense.resume(stage)  # through the layers as they are, before they are pruned
                stats = waiting.collector.from_all_processes(mine, compared, writers)
                for name in mine:
                    stats[name].check_finite(name)
                yield stats | self._replay.pooled(block.index, mine, stats)
                stats.clear()
                if not self.learning:
                    waiting.collector.forget(stage)
                if left or advance:
                    passes.resume(stage)
            self._sharing[kind] = _sharing(waiting.collector, block)
            for replay, each in zip(replays, every, strict=True):
                if advance or replay is self._dense:
                    replay.advance(block.index, each.ended())

    def _writers_of(self, block: Block, kind: object) -> dict[str, nn.Module]:
        """Return the layers of a block that write to the residual stream, by name."""
        if kind not in self._writers:
            self._writers[kind] = residual_writers(self._dense or self._replay, block)
            if not self._writers[kind]:
                warnings.warn(
                    f"plan.residual_correction has no effect on {block.name} and blocks of its kind: their outputs are "
                    "not their inputs plus the outputs of layers",
                    stacklevel=2,
                )
        return {f"{block.name}.{name}": block.module.get_submodule(name) for name in self._writers[kind]}


class _Waiting:
    """Passes through one block that wait at its layers, and the statistics of the layers' inputs."""

    def __init__(
        self,
        collector: Collector,
        replays: Sequence[BlockReplay],
        passes: Sequence[SuspendedPasses],
        compared: Collection[str],
        writers: Mapping[str, nn.Module],
        strengths: tuple[float, float],
    ) -> None:
        """Keep the passes.

        Args:
            collector: statistics so far.
            replays: replay of the pruned model and, if it is compared with, that of the dense one.
            passes: passes of each replay.
            compared: layers whose inputs are compared with those in the dense model.
            writers: layers whose outputs are added to the residual stream, by name, if its drift is needed.
            strengths: of the corrections for the drift of inputs and of the residual stream.
        """
        self.collector = collector
        self._hidden = [replay.hidden for replay in replays]
        self._passes = passes
        self._compared = compared
        self._writers = writers
        self._strengths = strengths
        self._seen: list[Seen] = [[] for _ in replays[0].hidden]

    def collect(self, stage: Sequence[str]) -> None:
        """Add the inputs of the layers of a stage, at which the passes wait."""
        passes, *dense = self._passes
        for batch, hidden in enumerate(self._hidden[0]):
            self.collector.sequences = len(hidden)
            here = _inputs(passes, batch, stage)
            if dense:
                there = _inputs(dense[0], batch, stage)
                for name in here:
                    if name not in there and (name in self._compared or name in self._writers):
                        raise InputError(
                            f"{name} is called on some batches in the pruned model only, so that its inputs cannot be "
                            f"compared with those in the dense model: {REMEDY} and plan.residual_correction to 0"
                        )
                self.collector.dense_inputs = {name: there[name] for name in here if name in self._compared}
                self.collector.output_targets = self._output_targets(batch, there)
            for name, inputs in here.items():
                self.collector.add(name, inputs, self._seen[batch])
        self.collector.dense_inputs, self.collector.output_targets = {}, {}

    def _output_targets(self, batch: int, there: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets of the writers' outputs on a batch, by layer name; see ``LayerStats.update``.

        Args:
            batch: index of the batch.
            there: outputs of writers in the dense model, by name, and inputs of other layers.
        """
        own, residual = self._strengths
        targets = {}
        for name in there:
            if name in self._writers:
                targets[name] = residual * self._residual_drift(batch)
                if own:
                    targets[name] += own * (_rows(there[name]) - _bias(self._writers[name])).to(targets[name])
        return targets

    def _residual_drift(self, batch: int) -> Tensor:
        """Return the dense model's residual stream minus the pruned one's, at the layer that both passes wait at."""
        hidden, of_dense = (_rows(each[batch]) for each in self._hidden)
        here, there = (passes.written[batch] for passes in self._passes)
        if here is None or there is None:
            return of_dense - hidden
        return (of_dense - hidden).to(here.device) + (_rows(there) - _rows(here))


def _rows(hidden: Tensor) -> Tensor:
    return working(hidden.reshape(-1, hidden.shape[-1]))


def _bias(layer: nn.Module) -> Tensor | float:
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else 0.0


def _next_stage(
    passes: SuspendedPasses, left: Mapping[str, nn.Module], sharing: Sequence[Sequence[str]], block: Block
) -> list[str]:
    """Return the names of the layers to prune next, the one at which passes wait first; the same on every rank.

    Args:
        passes: passes that wait.
        left: layers that are not pruned yet, by name, in the order of their definition.
        sharing: groups of layers that share an input in blocks of this kind, by name within the block.
        block: the block.
    """
    waits = [names for found in collectives.gather([list(w) for w in passes.waiting]) for names in found]
    order = list(left)
    reached = sorted({name for names in waits for name in names}, key=order.index)
    if not reached:
        raise InputError(f"{order[0]} was never called on the calibration set: exclude it with plan.exclude")
    first = reached[0]
    together = {name for names in waits if first in names for name in names}
    local = [
        f"{block.name}.{name}" for group in sharing if first.removeprefix(f"{block.name}.") in group for name in group
    ]
    stage = together.union(name for name in local if name in left)
    return [first, *(name for name in order if name in stage and name != first)]


def _inputs(passes: SuspendedPasses, batch: int, stage: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs of layers of a stage on a batch, those of its first layer for layers that are to share it."""
    here = passes.waiting[batch]
    found = {}
    for name in stage:
        inputs = here.get(name, here.get(stage[0]))
        if inputs is None:
            continue
        found[name] = inputs
        if name not in here:
            passes.expect(batch, name, inputs)
    return found


def _sharing(collector: Collector, block: Block) -> list[list[str]]:
    """Return the groups of layers that shared an input, by name within the block; the same on every rank."""
    groups = next((found for found in collectives.gather(collector.sharing()) if found), [])
    return [[name.removeprefix(f"{block.name}.") for name in group] for group in groups]
