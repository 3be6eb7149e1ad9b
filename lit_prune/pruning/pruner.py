"""The engine: allocate; then, block by block, calibrate, score, solve, write, reconstruct and propagate."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_prune.models.access import read_weight, to_parameter_layout, write_weight
from lit_prune.models.blocks import Block
from lit_prune.models.calibrate import Batch, BlockReplay, ForwardContext, evaluation_mode, resident
from lit_prune.models.experts import apart
from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, PackedMask, Pattern
from lit_prune.ops.linalg import relative_output_error
from lit_prune.pruning.dense import DenseModel
from lit_prune.pruning.journal import Journal, identity_of
from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.progress import OnProgress, Stages, peak_memory
from lit_prune.pruning.report import LayerReport, PruningReport, ReconstructionReport


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: PruningPlan,
    *,
    on_progress: OnProgress | None = None,
    journal_folder: str | Path | None = None,
    resume: bool = False,
    forward_context: ForwardContext = nullcontext,
    sparsity: float | None = None,
    allocation: Mapping[str, float] | None = None,
    within: Mapping[str, PackedMask] | None = None,
) -> PruningReport:
    """Prune a causal language model in place.

    >>> report = prune(model, [tokenizer(text, return_tensors="pt").input_ids], plan)  # doctest: +SKIP

    Args:
        model: any causal language model of transformers; its linear layers in the decoder blocks are replaced.
        batches: calibration batches: token ids ``[sequences, t]`` (int64) or the model's keyword arguments; not read
            where the plan needs no data.
        plan: what to prune, how far and how.
        on_progress: called at each stage of each block.
        journal_folder: where finished blocks are written, so that the run can be resumed; None = nowhere.
        resume: go on from the finished blocks in ``journal_folder``.
        forward_context: entered around the model's own computations, such as autocast; never around the solves.
        sparsity: how far to go on the way to the plan's own sparsity, for which the allocation is made; None = all.
        allocation: the sparsity of every layer by name, from an earlier report, in place of a new one.
        within: keep masks by parameter name; a weight that they prune stays pruned. None = any weight may be kept.

    Returns:
        What happened to every layer, and the masks.

    Raises:
        InputError: before any weight has changed, where plan, model and data do not fit.
        NumericalError: where a Gram matrix is singular or an activation is not finite; finished blocks stay pruned.
    """
    with apart(model), evaluation_mode(model):
        blocks, targets = plan.find_targets(model)
        calibration = list(batches) if plan.needs_data else []
        identity = identity_of(plan.describe(), model, calibration)
        journal = Journal(Path(journal_folder), identity, resume) if journal_folder is not None else None
        stages = Stages(len(blocks), on_progress)
        report = PruningReport(identity=identity)
        dense = DenseModel(model, blocks, targets, calibration, plan, stages, forward_context)
        gradients = dense.gradients()
        if allocation is None:
            evidence, report.metrics = dense.evidence(gradients), dense.metrics()
            allocation = plan.allocate(targets, evidence, report.metrics)
        report.allocation = dict(allocation)
        patterns = plan.patterns(targets, report.allocation, sparsity)
        replay = dense.replay() if plan.needs_replay else None
        reference = replay.fork() if replay and plan.needs_reference else None
        for block in blocks:
            mine = [target for target in targets if target.block == block.index]
            with resident(block.module, plan.device):
                if journal and journal.finished(block.index):
                    if reference:
                        reference.advance(block.index)
                    layers, reconstructions = journal.restore(block.index, model)
                else:
                    layers = _prune_block(
                        mine, patterns, replay, reference, gradients, plan, stages, block.index, within or {}
                    )
                    reconstructions = _reconstruct_block(model, block, mine, layers, replay, reference, plan, stages)
                    if journal:
                        journal.save(block.index, model, layers, reconstructions)
                report.layers += layers
                report.reconstructions += reconstructions
                if replay and block is not blocks[-1]:
                    with stages.stage("propagate", block.index):
                        replay.advance(block.index)
    report.seconds, report.peak_memory = stages.seconds, peak_memory()
    return report


def _prune_block(
    targets: Sequence[Target],
    patterns: dict[str, Pattern],
    replay: BlockReplay | None,
    reference: BlockReplay | None,
    gradients: dict[str, Tensor],
    plan: PruningPlan,
    stages: Stages,
    block: int,
    within: Mapping[str, PackedMask],
) -> list[LayerReport]:
    """Calibrate, score, solve and write the targets of one block."""
    stats: Mapping[str, LayerStats] = dict.fromkeys((t.name for t in targets), LayerStats(frozenset()))
    if replay and targets and plan.needs:
        with stages.stage("calibrate", block):
            stats = replay.collect(block, {t.name: t.module for t in targets}, plan.needs, reference)
    elif reference:
        with stages.stage("propagate", block):
            reference.advance(block)
    stats = plan.with_gradients(stats, {t.name: gradients.pop(t.name) for t in targets if gradients})
    with stages.stage("solve", block):
        return [
            _prune_layer(target, patterns[target.name], stats[target.name], plan, within.get(target.parameter))
            for target in targets
        ]


def _reconstruct_block(
    model: nn.Module,
    block: Block,
    targets: Sequence[Target],
    layers: Sequence[LayerReport],
    replay: BlockReplay | None,
    reference: BlockReplay | None,
    plan: PruningPlan,
    stages: Stages,
) -> list[ReconstructionReport]:
    """Train what is left of a pruned block, where the plan says so."""
    if not (plan.reconstruction and replay and reference and targets):
        return []
    with stages.stage("reconstruct", block.index):
        return [plan.reconstruction.run(model, block, targets, layers, replay, reference.hidden)]


def _prune_layer(
    target: Target, pattern: Pattern, stats: LayerStats, plan: PruningPlan, within: PackedMask | None
) -> LayerReport:
    start = time.perf_counter()
    weight = stats.make_up_for_drift(read_weight(target.module), plan.correction)
    allowed = to_parameter_layout(target.module, within.unpack().to(weight.device)) if within else None
    solution = plan.solve(target.name, weight, stats, pattern, allowed)
    output_error = relative_output_error(weight, solution.weight, stats.gram) if plan.output_error else None
    write_weight(target.module, solution.weight)
    return LayerReport(
        name=target.name,
        block=target.block,
        shape=target.shape,
        asked=pattern.sparsity,
        reached=1 - solution.keep.sum().item() / solution.keep.numel(),
        output_error=output_error,
        seconds=time.perf_counter() - start,
        mask=PackedMask.pack(to_parameter_layout(target.module, solution.keep)),
    )
