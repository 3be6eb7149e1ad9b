"""Statistics of the dense model, collected before the first block is pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.allocators.base import Layer
from lit_prune.calibration.batches import Batch, first_sequences, split_batch
from lit_prune.calibration.gradients import gradient_norms, holds_norms
from lit_prune.calibration.replay import BlockReplay, ForwardContext
from lit_prune.checkpoint.files import read_json, write_json
from lit_prune.checkpoint.plain_data import typed
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import Block
from lit_prune.models.targets import Target, as_layer
from lit_prune.ops import PackedMask, Pattern, Structured, collectives
from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.progress import Stages
from lit_prune.pruning.solving import LayerSolver
from lit_prune.pruning.trials import BlockTrials
from lit_prune.pruning.unit_times import UnitTimes, first_token
from lit_prune.pruning.units import Units
from lit_prune.sharding.block_store import BlockStore


@dataclass(frozen=True)
class DenseModel:
    """The unpruned model in evaluation mode, with its blocks, its target layers and the calibration set."""

    model: nn.Module
    store: BlockStore
    blocks: Sequence[Block]
    targets: Sequence[Target]
    calibration: Sequence[Batch]
    plan: PruningPlan
    stages: Stages
    forward_context: ForwardContext
    identity: Mapping[str, Any]
    units: Units | None = None
    """Units that a structured pattern removes; None if the pattern is not structured."""
    cached: list[str] = field(default_factory=list)
    """Names of the cache files that were read instead of recomputing their contents."""

    def replay(self, sequences: int | None = None) -> BlockReplay:
        """Return a replay of the first ``sequences`` calibration sequences (None = all), before the first block."""
        return self._replay(first_sequences(self._batches(), sequences))

    def _replay(self, batches: Sequence[Batch], share: bool = True) -> BlockReplay:
        plan = self.plan
        with self.stages.stage("record"):
            return BlockReplay(
                self.model,
                self.blocks,
                batches,
                plan.device,
                plan.hidden_device,
                getattr(torch, plan.hidden_dtype) if plan.hidden_dtype else None,
                self.forward_context,
                self.store,
                share,
            )

    def _times(self) -> UnitTimes:
        """Return the times of the blocks' units, for a prompt of one calibration sequence and for single tokens."""
        sequence = first_sequences(self.calibration, 1)[0]
        prompt, token = (self._replay([batch], share=False) for batch in (sequence, first_token(sequence)))
        return UnitTimes(prompt, token)

    def _batches(self) -> Sequence[Batch]:
        """Return the calibration batches, split to the batch size of the reconstruction if the plan has one."""
        reconstruction = self.plan.reconstruction
        if reconstruction is None:
            return self.calibration
        return [part for batch in self.calibration for part in split_batch(batch, reconstruction.sequences)]

    def evidence(self, gradients: Mapping[str, Tensor]) -> dict[int, Any]:
        """Let the allocator observe every dense block, if it needs to, and return its observations by block index.

        Args:
            gradients: gradient norms by layer name, as returned by ``gradients``, for an allocator that runs the
            scorer.
        """
        allocator = self.plan.allocator
        if not allocator.needs:
            return {}
        tried = "output_error" in allocator.needs
        needs = allocator.needs - {"output_error", "seconds"} | (self.plan.method_needs if tried else frozenset())
        replay, evidence = self.replay(allocator.observed_sequences), {}
        times = self._times() if "seconds" in allocator.needs else None
        for block in self.blocks:
            mine = [target for target in self.targets if target.block == block.index]
            with self.stages.stage("observe", block.index), self.resident(block):
                outputs = replay.outputs(block.index) if tried and mine else None
                if mine:
                    stats = self.plan.with_gradients(
                        replay.collect(block.index, {t.name: t.module for t in mine}, needs), gradients
                    )
                    evidence[block.index] = allocator.observe(
                        [as_layer(target) for target in mine],
                        [stats[target.name] for target in mine],
                        self.plan.grouped_pattern,
                        BlockTrials(self, block, mine, replay, stats, outputs or [], times),
                    )
                replay.advance(block.index, outputs)
        return evidence

    def only(self, pattern: Structured) -> DenseModel:
        """Return a copy with the units of a pattern alone."""
        return replace(self, units=self.units.only(pattern) if self.units else None)

    def solved(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets whose weights are solved: with a structured pattern, the layers that read its units."""
        return [target for target in targets if self.units is None or target.name in self.units.by_consumer]

    def solver(
        self,
        plan: PruningPlan,
        allocation: Mapping[str, float],
        sparsity: float | None = None,
        allowed: Mapping[str, PackedMask] | None = None,
    ) -> LayerSolver:
        """Return the solver of layers for an allocation.

        Args:
            plan: the plan, or a draft of it.
            allocation: sparsities by layer name.
            sparsity: overall sparsity to scale ``allocation`` to; None = the plan's own.
            allowed: keep masks by parameter name; only weights that they keep may be kept.
        """
        if self.units:
            part = 1.0 if sparsity is None else sparsity / plan.pattern.sparsity
            return LayerSolver(plan, self.units.patterns(allocation, part), allowed or {}, self.units.by_consumer)
        patterns: Mapping[str, Pattern] = plan.patterns(self.targets, allocation, sparsity, allowed)
        return LayerSolver(plan, patterns, allowed or {})

    def metrics(self) -> dict[str, float]:
        """Return the allocator's metric of every target's weight, by layer name; cached values are not recomputed."""
        allocator = self.plan.allocator
        if allocator.metric_name is None:
            return {}
        path = self._cached(f"{allocator.metric_name}-{self.identity['model']}.json")
        known: dict[str, float] = collectives.on_first_rank(
            lambda: _read_metrics(path) if path and path.is_file() else {}
        )
        if path and known:
            self.cached.append(path.name)
        missing = [as_layer(target) for target in self.targets if target.name not in known]
        for block in self.blocks:
            if mine := [layer for layer in missing if layer.block == block.index]:
                with self.stages.stage("measure", block.index), self.resident(block):
                    known |= self._measured(mine)
        if missing and path:
            collectives.on_first_rank(lambda: write_json(path, known))
        return known

    def _measured(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return the allocator's metrics of a block's layers, by layer name; the processes divide the layers."""
        owners = collectives.partition([layer.numel for layer in layers])
        mine = [layer for layer, owner in zip(layers, owners, strict=True) if owner == collectives.rank()]
        measured, failed = {}, None
        try:
            measured = self.plan.allocator.measure(mine)
        except NumericalError as error:
            failed = error
        collectives.raise_first(collectives.gather(failed))
        found = collectives.gather(measured)
        return {name: value for part in found for name, value in part.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient norm ``[o, i]`` of every target by layer name; empty unless the scorer needs it."""
        scorer = self.plan.scorer
        if scorer is None or "gradient" not in scorer.needs:
            return {}
        precision = precision_of(self.forward_context, self.plan.device or next(self.model.parameters()).device)
        parts = (scorer.gradient_norm, precision or "plain", self.identity["model"], self.identity["data"])
        path = self._cached(f"gradients-{'-'.join(parts)}.safetensors")
        if path and holds_norms(path, self.targets):
            self.cached.append(path.name)
        with self.stages.stage("gradients"):
            return gradient_norms(
                self.model,
                self.calibration,
                self.targets,
                scorer.gradient_norm,
                path,
                self.forward_context,
                self.store,
            )

    def resident(self, block: Block) -> AbstractContextManager[set[str]]:
        """Keep a block resident on the device that processes it; see ``BlockStore.resident``."""
        then = self.blocks[block.index + 1] if block.index + 1 < len(self.blocks) else None
        return self.store.resident(block, self.plan.device, then)

    def _cached(self, name: str) -> Path | None:
        """Return the path of a cache file; None if the plan has no cache."""
        return Path(self.plan.cache).expanduser() / name if self.plan.cache else None


def _read_metrics(path: Path) -> dict[str, float]:
    try:
        known: dict[str, float] = typed(read_json(path), dict[str, float], "it")
    except TypeError as error:
        raise InputError(f"plan.cache has {str(path)!r}, which is damaged ({error}): delete it") from error
    return {name: value for name, value in known.items() if math.isfinite(value)}


def precision_of(forward_context: ForwardContext, device: torch.device | str) -> str | None:
    """Return the autocast dtype within a context, such as ``bfloat16``; None = no autocast."""
    kind = torch.device(device).type
    with forward_context():
        return str(torch.get_autocast_dtype(kind)).split(".")[-1] if torch.is_autocast_enabled(kind) else None
