"""Trial prunings of a dense block, which are undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from lit_prune.allocators.base import Trial
from lit_prune.calibration.replay import BlockReplay
from lit_prune.models.blocks import Block
from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, Pattern, Structured
from lit_prune.pruning.unit_times import UnitTimes
from lit_prune.sharding.parameters import weights_restored

if TYPE_CHECKING:
    from lit_prune.pruning.dense_statistics import DenseModel


@dataclass(frozen=True)
class BlockTrials:
    """Prunes a dense block with the draft solver, measures its output error, and restores the weights."""

    dense: DenseModel
    block: Block
    targets: Sequence[Target]
    """Layers of the block to prune."""
    replay: BlockReplay
    """Replay positioned before the block."""
    stats: Mapping[str, LayerStats]
    """Statistics of the layers' inputs, by layer name."""
    outputs: Sequence[Tensor]
    """Outputs ``[sequences, t, hidden]`` of the dense block on every batch."""
    times: UnitTimes | None
    """Times of units; None = trials are not timed."""

    def __call__(self, pattern: Pattern) -> Trial:
        """Return the result of pruning the block to a pattern; see ``Allocator.observe``."""
        if not isinstance(pattern, Structured):
            return self._pruned(self.dense, pattern)
        if pattern.units != ("blocks",):
            return self._pruned(self.dense.only(pattern), pattern)
        removed = sum(target.shape[0] * target.shape[1] for target in self.targets)
        seconds = self.times.of_block(self.block) if self.times else 0.0
        return Trial(self.replay.error_without(self.outputs), removed, seconds)

    def _pruned(self, dense: DenseModel, pattern: Pattern) -> Trial:
        faster = dense.plan.solver.draft()
        draft = replace(dense.plan, pattern=pattern, solver=faster, output_error=False, quantize=None)
        solved = dense.solved(self.targets)
        with weights_restored([target.module for target in self.targets]):
            solver = dense.solver(draft, dict.fromkeys((target.name for target in dense.targets), pattern.sparsity))
            reports = solver.prune(solved, {t.name: self.stats[t.name] for t in solved}, read_again=True)
            error = self.replay.output_error(self.block.index, self.outputs)
        removed = sum(layer.mask.numel - layer.mask.kept for layer in reports)
        if not (self.times and dense.units):
            return Trial(error, removed)
        part = removed / sum(layer.numel for layer in reports)
        couplings = [c for c in dense.units.couplings if c.consumer.block == self.block.index]
        return Trial(error, removed, part * self.times.of_units(self.block, couplings))
