"""What a run learns from the dense model, before the first block is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_prune.models.access import read_weight, weights_restored, write_weight
from lit_prune.models.blocks import Block
from lit_prune.models.calibrate import Batch, BlockReplay, ForwardContext, count_sequences, resident, split_batch
from lit_prune.models.gradients import gradient_norms
from lit_prune.models.io import model_fingerprint, read_json, write_json
from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, Pattern
from lit_prune.pruning.plan import PruningPlan, as_layer
from lit_prune.pruning.progress import Stages


@dataclass(frozen=True)
class DenseModel:
    """The model as it came, with its blocks, its targets and the calibration set; in evaluation mode."""

    model: nn.Module
    blocks: Sequence[Block]
    targets: Sequence[Target]
    calibration: Sequence[Batch]
    plan: PruningPlan
    stages: Stages
    forward_context: ForwardContext

    def replay(self, sequences: int | None = None) -> BlockReplay:
        """Return a replay of the first sequences (None = all) of the calibration set, before the first block."""
        with self.stages.stage("record"):
            return BlockReplay(
                self.model,
                self.blocks,
                _first(self._batches(), sequences),
                self.plan.device,
                self.plan.hidden_device,
                self.forward_context,
            )

    def _batches(self) -> Sequence[Batch]:
        """Return the calibration set, in batches of a reconstruction's steps where there is one."""
        reconstruction = self.plan.reconstruction
        if reconstruction is None:
            return self.calibration
        return [part for batch in self.calibration for part in split_batch(batch, reconstruction.sequences)]

    def evidence(self, gradients: Mapping[str, Tensor]) -> dict[int, Any]:
        """Show the allocator every block, where it asks for that, and return what it observed, by block.

        Args:
            gradients: what ``gradients`` returned, for a scorer that is tried.
        """
        allocator = self.plan.allocator
        if not allocator.needs:
            return {}
        tried = "output_error" in allocator.needs
        needs = allocator.needs - {"output_error"} | (self.plan.method_needs if tried else frozenset())
        replay, evidence = self.replay(allocator.observed_sequences), {}
        for block in self.blocks:
            mine = [target for target in self.targets if target.block == block.index]
            with self.stages.stage("observe", block.index), resident(block.module, self.plan.device):
                outputs = replay.outputs(block.index) if tried and mine else None
                if mine:
                    stats = self.plan.with_gradients(
                        replay.collect(block.index, {t.name: t.module for t in mine}, needs), gradients
                    )
                    evidence[block.index] = allocator.observe(
                        [as_layer(target) for target in mine],
                        [stats[target.name] for target in mine],
                        self.plan.grouped_pattern,
                        partial(self._output_error, replay, outputs or [], mine, stats),
                    )
                replay.advance(block.index, outputs)
        return evidence

    def _output_error(
        self,
        replay: BlockReplay,
        outputs: Sequence[Tensor],
        targets: Sequence[Target],
        stats: Mapping[str, LayerStats],
        pattern: Pattern,
    ) -> float:
        """Prune a block's targets as the plan drafts it, and return its output error; the dense weights come back."""
        draft = replace(self.plan, solver=self.plan.solver.draft())
        with weights_restored([target.module for target in targets]):
            for target in targets:
                solution = draft.solve(target.name, read_weight(target.module), stats[target.name], pattern)
                write_weight(target.module, solution.weight)
            return replay.output_error(targets[0].block, outputs)

    def metrics(self) -> dict[str, float]:
        """Return what the allocator measures of every target's weight, by name; what the cache holds is not redone."""
        allocator, cache = self.plan.allocator, self.plan.cache
        if allocator.metric_name is None:
            return {}
        path = cache and Path(cache) / f"{allocator.metric_name}-{model_fingerprint(self.model)}.json"
        known: dict[str, float] = read_json(path) if path and path.is_file() else {}
        missing = [as_layer(target) for target in self.targets if target.name not in known]
        if missing:
            with self.stages.stage("measure"):
                known |= allocator.measure(missing)
            if path:
                write_json(path, known)
        return known

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient norm ``[o, i]`` of every target by name, where the scorer needs it."""
        scorer = self.plan.scorer
        if scorer is None or "gradient" not in scorer.needs:
            return {}
        with self.stages.stage("gradients"):
            return gradient_norms(
                self.model,
                self.calibration,
                self.targets,
                scorer.gradient_norm,
                self.plan.cache,
                self.forward_context,
            )


def _first(batches: Sequence[Batch], sequences: int | None) -> Sequence[Batch]:
    """Return the first sequences of batches, the last batch cut where it must be."""
    if sequences is None:
        return batches
    found: list[Batch] = []
    for batch in batches:
        left = sequences - sum(count_sequences(part) for part in found)
        if left <= 0:
            break
        found.append(split_batch(batch, left)[0])
    return found
