"""The engine: allocate; then, block by block, calibrate, score, solve, write, reconstruct and propagate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.batches import Batch
from lit_prune.calibration.replay import BlockReplay, ForwardContext, evaluation_mode
from lit_prune.checkpoint.fingerprints import data_fingerprint, model_fingerprint
from lit_prune.models.blocks import Block
from lit_prune.models.experts import apart
from lit_prune.models.limits import check_tokens
from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, PackedMask, Pattern, collectives
from lit_prune.pruning.dense_statistics import DenseModel, precision_of
from lit_prune.pruning.journal import Journal, identity_of
from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.progress import OnProgress, Stages, peak_memory
from lit_prune.pruning.solving import prune_layers
from lit_prune.reporting.report import LayerReport, PruningReport, ReconstructionReport, changed_parameters
from lit_prune.sharding.block_store import unsharded


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
        model: any causal language model of transformers; its linear layers in the decoder blocks are replaced. One that
            a strategy has sharded (FSDP2, DeepSpeed ZeRO) is gathered one block at a time.
        batches: calibration batches: token ids ``[sequences, t]`` (int64) or the model's keyword arguments; not read
            where the plan needs no data. Where torch.distributed is set up, every process gives the same batches, and
            they share the work out.
        plan: what to prune, how far and how.
        on_progress: called at each stage of each block.
        journal_folder: where finished blocks are written, so that the run can be resumed; None = nowhere.
        resume: go on from the finished blocks in ``journal_folder``; one whose files are damaged is pruned again.
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
    with unsharded(model) as (whole, store), apart(whole), evaluation_mode(whole), ExitStack() as stack:
        blocks, targets = plan.find_targets(whole)
        calibration = list(batches) if plan.needs_data else []
        for batch in calibration:
            check_tokens(whole, batch["input_ids"] if isinstance(batch, Mapping) else batch)
        identity = identity_of(plan.describe(), model_fingerprint(whole, store), calibration)
        journal = None
        if journal_folder is not None:
            how = _circumstances(whole, plan, forward_context, sparsity, allocation, within)
            journal = stack.enter_context(Journal(Path(journal_folder), {**identity, **how}, resume))
        stages = Stages(len(blocks), on_progress)
        report = PruningReport(identity=identity)
        dense = DenseModel(whole, store, blocks, targets, calibration, plan, stages, forward_context, identity)
        gradients = dense.gradients()
        report.allocation, report.metrics = _allocate(dense, gradients, allocation, journal)
        report.cached = dense.cached
        patterns = plan.patterns(targets, report.allocation, sparsity, within)
        replay = dense.replay() if plan.needs_replay else None
        reference = replay.fork() if replay and plan.needs_reference else None
        layers: Sequence[LayerReport] = ()
        for block in blocks:
            mine = [target for target in targets if target.block == block.index]
            with dense.resident(block) as changed:
                if journal and (finished := journal.finished(block.index)):
                    _advance_dense(replay, reference, plan, stages, block)
                    layers, reconstructions = finished.restore(whole)
                else:
                    layers = _prune_block(
                        mine, patterns, replay, reference, gradients, plan, stages, block, within, before=layers
                    )
                    reconstructions = _reconstruct_block(whole, block, mine, layers, replay, reference, plan, stages)
                    if journal:
                        journal.save(block.index, whole, layers, reconstructions, wait=store.low_memory)
                changed.update(changed_parameters(layers, reconstructions))
                report.layers += layers
                report.reconstructions += reconstructions
                if replay and plan.propagate == "pruned" and block is not blocks[-1]:
                    with stages.stage("propagate", block.index):
                        replay.advance(block.index)
    report.seconds, report.peak_memory = stages.seconds, peak_memory()
    return report


def _circumstances(
    model: nn.Module,
    plan: PruningPlan,
    forward_context: ForwardContext,
    sparsity: float | None,
    allocation: Mapping[str, float] | None,
    within: Mapping[str, PackedMask] | None,
) -> dict[str, Any]:
    """Return what else a run's bits depend on, beside plan, model, data and versions."""
    device = torch.device(plan.device or next(model.parameters()).device).type
    return {
        "sparsity": sparsity,
        "allocation": None if allocation is None else dict(allocation),
        "within": None if within is None else data_fingerprint([{n: mask.bits for n, mask in within.items()}]),
        "device": device,
        "autocast": precision_of(forward_context, device),
        "processes": collectives.world_size(),
    }


def _allocate(
    dense: DenseModel, gradients: Mapping[str, Tensor], known: Mapping[str, float] | None, journal: Journal | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the sparsity of every layer and what the allocator measured of its weight, both by name."""
    if known is not None:
        return dict(known), {}
    if journal and (kept := journal.allocation()) is not None:
        return kept
    evidence, metrics = dense.evidence(gradients), dense.metrics()
    allocation = dense.plan.allocate(dense.targets, evidence, metrics)
    if journal:
        journal.save_allocation(allocation, metrics)
    return allocation, metrics


def _prune_block(
    targets: Sequence[Target],
    patterns: Mapping[str, Pattern],
    replay: BlockReplay | None,
    reference: BlockReplay | None,
    gradients: dict[str, Tensor],
    plan: PruningPlan,
    stages: Stages,
    block: Block,
    within: Mapping[str, PackedMask] | None,
    before: Sequence[LayerReport],
) -> list[LayerReport]:
    """Calibrate, score, solve and write the targets of one block."""
    stats = dict.fromkeys((t.name for t in targets), LayerStats(frozenset()))
    at_once = plan.propagate == "dense"
    if replay and targets and plan.needs:
        with stages.stage("calibrate", block.index):
            stats = replay.collect(block.index, {t.name: t.module for t in targets}, plan.needs, reference, at_once)
    else:
        _advance_dense(replay, reference, plan, stages, block)
    stats = plan.with_gradients(stats, {t.name: gradients.pop(t.name) for t in targets if gradients})
    with stages.stage("solve", block.index):
        return prune_layers(targets, patterns, stats, plan, within or {}, before)


def _advance_dense(
    replay: BlockReplay | None, reference: BlockReplay | None, plan: PruningPlan, stages: Stages, block: Block
) -> None:
    """Move what reads dense blocks past one, before it is pruned."""
    for reader in (reference, replay if plan.propagate == "dense" else None):
        if reader:
            with stages.stage("propagate", block.index):
                reader.advance(block.index)


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
