"""The pruning engine: allocate; then, block by block, calibrate, score, solve, write, reconstruct and propagate."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.batches import Batch
from lit_prune.calibration.replay import BlockReplay, ForwardContext, evaluation_mode
from lit_prune.calibration.sequential import SequentialCalibration
from lit_prune.checkpoint.fingerprints import data_fingerprint, model_fingerprint
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.models.experts import apart
from lit_prune.models.limits import check_tokens
from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, PackedMask, Structured, collectives
from lit_prune.pruning.dense_statistics import DenseModel, precision_of
from lit_prune.pruning.depth import check_blocks, remove_blocks, report_of, zero
from lit_prune.pruning.journal import Journal, identity_of
from lit_prune.pruning.memory import choose_passes
from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.progress import OnProgress, Stages, peak_memory
from lit_prune.pruning.progress import progress as show_progress
from lit_prune.pruning.solving import LayerSolver
from lit_prune.pruning.units import find_units, is_uneven
from lit_prune.reporting.report import (
    Calibration,
    LayerReport,
    ModelSize,
    PruningReport,
    ReconstructionReport,
    changed_parameters,
)
from lit_prune.sharding.block_store import unsharded


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: PruningPlan,
    *,
    progress: bool = False,
    on_progress: OnProgress | None = None,
    journal_folder: str | Path | None = None,
    resume: bool = False,
    forward_context: ForwardContext = nullcontext,
    sparsity: float | None = None,
    allocation: Mapping[str, float] | None = None,
    allowed: Mapping[str, PackedMask] | None = None,
) -> PruningReport:
    """Prune a causal language model in place.

    >>> report = prune(model, [tokenizer(text, return_tensors="pt").input_ids], plan)  # doctest: +SKIP

    Args:
        model: any causal language model of transformers; the linear layers in its decoder blocks are pruned in place.
            A model sharded by a strategy (FSDP2, DeepSpeed ZeRO) is gathered one block at a time.
        batches: calibration batches: token ids ``[sequences, t]`` (int64) or the model's keyword arguments; not read
            if the plan needs no data. If torch.distributed is initialized, every process must pass the same batches,
            and the processes divide the work.
        plan: pruning plan: pattern, scorer, allocator and solver.
        progress: show a bar on a terminal, or a line per block elsewhere, as in a notebook.
        on_progress: callback invoked at each stage of each block.
        journal_folder: folder to which finished blocks are written, so that the run can be resumed; None = no journal.
        resume: resume from the finished blocks in ``journal_folder``; a block whose files are damaged is pruned again.
        forward_context: context manager entered around the model's own computations, such as autocast; never around
            the solves.
        sparsity: intermediate sparsity on the way to the plan's own, for which the allocation is made; None = the
            plan's own.
        allocation: sparsity of every layer by name, from an earlier report, instead of a new allocation.
        allowed: keep masks by parameter name; only weights that they keep may be kept. None = any weight may be kept.

    Returns:
        Report of every layer, with the keep masks.

    Raises:
        InputError: if plan, model and data are incompatible; raised before any weight is changed.
        NumericalError: if a Gram matrix is singular or an activation is not finite; finished blocks stay pruned.
    """
    _check_steps(plan, sparsity, allocation, allowed)
    with unsharded(model) as (whole, store), apart(whole), evaluation_mode(whole), ExitStack() as stack:
        blocks, targets = plan.find_targets(whole)
        calibration = list(batches) if plan.needs_data else []
        for batch in calibration:
            check_tokens(whole, batch["input_ids"] if isinstance(batch, Mapping) else batch)
        units = None if plan.removes_only_blocks else find_units(whole, blocks, targets, plan, store)
        targets = list(units.targets) if units else targets
        plan = choose_passes(whole, targets, calibration, plan)
        identity = identity_of(plan.describe(), model_fingerprint(whole, store), calibration)
        journal = None
        if journal_folder is not None and not plan.removes_only_blocks:
            how = _circumstances(whole, plan, forward_context, sparsity, allocation, allowed)
            journal = stack.enter_context(Journal(Path(journal_folder), {**identity, **how}, resume))
        listeners = [on_progress, stack.enter_context(show_progress()) if progress else None]
        stages = Stages(len(blocks), [listener for listener in listeners if listener])
        report = PruningReport(identity=identity, calibration=Calibration.of(calibration))
        dense = DenseModel(whole, store, blocks, targets, calibration, plan, stages, forward_context, identity, units)
        if plan.removes_blocks:
            check_blocks(dense)
        if plan.removes_only_blocks:
            report.layers = remove_blocks(dense)
            return _finished(report, whole, stages)
        gradients = dense.gradients()
        report.allocation, report.metrics = _allocate(dense, gradients, allocation, journal)
        report.cached = dense.cached
        if units:
            units.check(whole, report.allocation, is_uneven(plan))
        solver = dense.solver(plan, report.allocation, sparsity, allowed)
        replay = dense.replay() if plan.needs_replay else None
        reference = replay.fork() if replay and plan.needs_reference else None
        run = PruningRun(dense, solver, gradients, replay, reference, journal, report)
        for block in blocks[: run.last + 1]:
            run.prune(block)
        _finished(report, whole, stages)
    if plan.scorer and (concern := plan.scorer.concern(report.diagnostics)):
        warnings.warn(concern, stacklevel=2)
    return report


def _finished(report: PruningReport, model: nn.Module, stages: Stages) -> PruningReport:
    """Add what is known at the end of a run to its report, and return it."""
    report.size = ModelSize.of(model, report.masks)
    report.seconds, report.peak_memory = stages.seconds, peak_memory()
    return report


@dataclass
class PruningRun:
    """State of a run between two blocks."""

    dense: DenseModel
    solver: LayerSolver
    gradients: dict[str, Tensor]
    """Gradient norms of the remaining layers, by layer name; empty if the scorer needs none."""
    replay: BlockReplay | None
    """Calibration set's hidden states before the next block; None if the plan needs no data."""
    reference: BlockReplay | None
    """Calibration set's hidden states in the dense model; None if the plan does not use them."""
    journal: Journal | None
    report: PruningReport
    latest: Sequence[LayerReport] = ()
    """Reports of the previous block's layers."""

    @cached_property
    def removed(self) -> list[int]:
        """Indices of the blocks that are removed entirely."""
        return self.dense.units.removed_blocks(self.report.allocation) if self.dense.units else []

    @property
    def last(self) -> int:
        """Index of the last block with a layer to prune; nothing behind it needs calibration inputs."""
        return max(target.block for target in self.dense.targets)

    def __post_init__(self) -> None:
        """Prepare to calibrate layer by layer, if the plan does."""
        plan = self.dense.plan
        self.sequential = (
            SequentialCalibration(self.replay, self.reference, plan.correction, plan.residual_correction)
            if self.replay and plan.sequential
            else None
        )

    def prune(self, block: Block) -> None:
        """Calibrate, score, solve, write, reconstruct and propagate one block, or restore it from the journal."""
        report = self.report
        reconstructions: list[ReconstructionReport] = []
        with self.dense.resident(block) as changed:
            if block.index in self.removed:
                layers = self._remove(block, changed)
            elif self.journal and (finished := self.journal.finished(block.index)):
                self._advance_dense(block)
                layers, reconstructions = finished.restore(self.dense.model)
            else:
                layers = self._solve(block)
                reconstructions = self._reconstruct(block, layers)
                if self.journal:
                    wait = self.dense.store.low_memory
                    self.journal.save(block.index, self.dense.model, layers, reconstructions, wait=wait)
            changed.update(changed_parameters(layers, reconstructions))
            self.latest = layers
            report.layers += layers
            report.reconstructions += reconstructions
            if self.replay and self.replay.position == block.index < self.last:
                with self.dense.stages.stage("propagate", block.index):
                    self.replay.advance(block.index)

    def _remove(self, block: Block, changed: set[str]) -> list[LayerReport]:
        """Zero all layers of a block that is removed; return their reports. It is quick, so no journal has it."""
        self._advance_dense(block)
        changed.update(zero(block))
        return [report_of(target, True) for target in self._targets(block)]

    def _solve(self, block: Block) -> list[LayerReport]:
        """Calibrate, score, solve and write the targets of a block; those without units stay as they are."""
        targets = self._targets(block)
        solved = self.dense.solved(targets)
        found: dict[str, LayerReport] = {}
        with closing(self._calibrated(block, solved)) as parts:
            for stats in parts:
                part = [target for target in solved if target.name in stats]
                gradients = {target.name: self.gradients.pop(target.name) for target in part if self.gradients}
                with self.dense.stages.stage("solve", block.index):
                    complete = self.dense.plan.with_gradients(stats, gradients)
                    read_again = self.sequential is not None and self.sequential.learning
                    done = self.solver.prune(part, complete, self._before(targets, part), read_again)
                    found |= {report.name: report for report in done}
        return [found.get(target.name) or report_of(target, False) for target in targets]

    def _calibrated(self, block: Block, targets: Sequence[Target]) -> Generator[dict[str, LayerStats]]:
        """Yield the statistics of a block's targets in parts, each of which is pruned before the next is asked for."""
        plan, timer = self.dense.plan, self.dense.stages
        modules = {target.name: target.module for target in targets}
        if not (self.replay and targets and plan.needs):
            self._advance_dense(block)
            yield dict.fromkeys(modules, LayerStats(frozenset()))
        elif self.sequential:
            advance = plan.reconstruction is None and block.index < self.last
            with closing(self.sequential.stages(block, modules, plan.needs, advance)) as parts:
                while True:
                    with timer.stage("calibrate", block.index):
                        stats = next(parts, None)
                    if stats is None:
                        return
                    yield stats
        else:
            with timer.stage("calibrate", block.index):
                at_once = plan.propagate == "dense"
                stats = self.replay.collect(block.index, modules, plan.needs, self.reference, at_once)
            yield stats

    def _before(self, targets: Sequence[Target], part: Sequence[Target]) -> list[LayerReport]:
        """Return the reports of the layers of the previous block that correspond to a part of this one's."""
        same = len(self.latest) == len(targets)
        return [before for target, before in zip(targets, self.latest, strict=True) if target in part] if same else []

    def _reconstruct(self, block: Block, layers: Sequence[LayerReport]) -> list[ReconstructionReport]:
        """Train the kept weights of a pruned block, if the plan has a reconstruction."""
        how, targets = self.dense.plan.reconstruction, self._targets(block)
        if not (how and self.replay and self.reference and targets):
            return []
        with self.dense.stages.stage("reconstruct", block.index):
            return [how.run(self.dense.model, block, targets, layers, self.replay, self.reference.hidden)]

    def _advance_dense(self, block: Block) -> None:
        """Propagate through a block that is still dense, if the plan needs the dense model's hidden states."""
        for reader in (self.reference, self.replay if self.dense.plan.propagate == "dense" else None):
            if reader:
                with self.dense.stages.stage("propagate", block.index):
                    reader.advance(block.index)

    def _targets(self, block: Block) -> list[Target]:
        return [target for target in self.dense.targets if target.block == block.index]


def _check_steps(
    plan: PruningPlan,
    sparsity: float | None,
    allocation: Mapping[str, float] | None,
    allowed: Mapping[str, PackedMask] | None,
) -> None:
    """Raise ``InputError`` if a structured plan cannot be carried out in steps with these arguments of ``prune``."""
    given = {"sparsity": sparsity, "allocation": allocation, "allowed": allowed}
    if plan.removes_blocks and (names := [name for name, value in given.items() if value is not None]):
        raise InputError(
            f"{names[0]} is given, and plan.pattern.units has blocks, which are removed in one run: leave it out"
        )
    if sparsity is not None and isinstance(plan.pattern, Structured) and not 0 <= sparsity <= plan.pattern.sparsity:
        raise InputError(
            f"sparsity is {sparsity:g}: units are removed on the way to plan.pattern.sparsity, so it must be from 0 to "
            f"{plan.pattern.sparsity:g}"
        )


def _circumstances(
    model: nn.Module,
    plan: PruningPlan,
    forward_context: ForwardContext,
    sparsity: float | None,
    allocation: Mapping[str, float] | None,
    allowed: Mapping[str, PackedMask] | None,
) -> dict[str, Any]:
    """Return the other circumstances that affect a run's exact result, besides plan, model, data and versions."""
    device = torch.device(plan.device or next(model.parameters()).device).type
    return {
        "sparsity": sparsity,
        "allocation": None if allocation is None else dict(allocation),
        "allowed": None if allowed is None else data_fingerprint([{n: mask.bits for n, mask in allowed.items()}]),
        "device": device,
        "autocast": precision_of(forward_context, device),
        "processes": collectives.world_size(),
    }


def _allocate(
    dense: DenseModel, gradients: Mapping[str, Tensor], known: Mapping[str, float] | None, journal: Journal | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the sparsity of every layer and the allocator's metric of its weight, both by layer name."""
    if known is not None:
        return dict(known), {}
    if journal and (kept := journal.allocation()) is not None:
        return kept
    evidence, metrics = dense.evidence(gradients), dense.metrics()
    allocation = dense.plan.allocate(dense.targets, evidence, metrics)
    if journal:
        journal.save_allocation(allocation, metrics)
    return allocation, metrics
