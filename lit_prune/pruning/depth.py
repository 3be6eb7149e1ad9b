"""Removal of whole decoder blocks, the least important first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lit_prune.allocators import Uniform
from lit_prune.calibration.replay import BlockReplay
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.models.shrink import smaller_config
from lit_prune.models.targets import Target
from lit_prune.ops import PackedMask, collectives
from lit_prune.ops.linalg import relative_token_errors
from lit_prune.ops.structured import Structured
from lit_prune.pruning.dense_statistics import DenseModel
from lit_prune.reporting.report import LayerReport
from lit_prune.sharding.parameters import PRUNABLE, to_parameter_layout

_SEQUENCES = 4
"""Number of calibration sequences on which the model is tried without a block."""
_SHORTLIST = 8
"""Number of blocks tried for each removal: those that change their inputs least."""


@torch.no_grad()
def remove_blocks(dense: DenseModel) -> list[LayerReport]:
    """Zero all linear layers of the least important blocks, so that only their residual stream passes through them.

    A block is removed at a time, and the others are measured anew. ``block_score: output_error`` removes the block
    without which the outputs of the last block change least, ``mean_t ||y'_t - y_t||² / ||y_t||²`` over the tokens of a
    few calibration sequences, of those that change their own inputs least. ``cosine`` is ShortGPT's score (Men et al.,
    2024), the mean of one minus the cosine of a block's input and output.

    Returns:
        Reports of all layers, with empty masks for those of removed blocks.
    """
    pattern = dense.plan.pattern
    assert isinstance(pattern, Structured)
    count = _count(dense, pattern)
    replay = dense.replay(_SEQUENCES)
    reference: list[Tensor] = []
    removed: list[int] = []
    for _ in range(count):
        with dense.stages.stage("observe", removed[-1] if removed else 0):
            forks = _forks(dense, replay, removed)
            reference = reference or list(forks[-1].hidden)
            left = [block for block in dense.blocks if block.index not in removed]
            changes = {block.index: _change(forks, block, pattern.block_score == "cosine") for block in left}
            tried = sorted(changes, key=lambda index: changes[index])
            if pattern.block_score == "output_error":
                errors = {index: _error(dense, forks, index, removed, reference) for index in tried[:_SHORTLIST]}
                tried = sorted(errors, key=lambda index: errors[index])
            removed.append(tried[0])
    for block in dense.blocks:
        if block.index in removed:
            with dense.resident(block) as changed:
                changed.update(zero(block))
    return [report_of(target, target.block in removed) for target in dense.targets]


def check_blocks(dense: DenseModel) -> None:
    """Raise ``InputError`` if a plan that removes blocks cannot be carried out."""
    pattern, plan = dense.plan.pattern, dense.plan
    assert isinstance(pattern, Structured)
    if plan.removes_only_blocks and not isinstance(plan.allocator, Uniform):
        raise InputError(f"plan.allocator is {type(plan.allocator).__name__}: blocks go as a whole; leave it out")
    names = {target.name for target in dense.targets}
    for block in dense.blocks:
        for name, module in block.module.named_modules():
            if isinstance(module, PRUNABLE) and (full := f"{block.name}.{name}") not in names:
                raise InputError(f"plan.include and plan.exclude leave out {full}: blocks are removed as a whole")
    smaller_config(dense.model, {}, range(_count(dense, pattern) if plan.removes_only_blocks else 1))


def _count(dense: DenseModel, pattern: Structured) -> int:
    """Return the number of blocks to remove."""
    count = round(pattern.sparsity * len(dense.blocks))
    if count >= len(dense.blocks):
        raise InputError(
            f"plan.pattern.sparsity {pattern.sparsity:g} would leave none of the {len(dense.blocks)} blocks: lower it"
        )
    if not count and pattern.sparsity:
        raise InputError(
            f"plan.pattern.sparsity {pattern.sparsity:g} is less than half of one of {len(dense.blocks)} blocks: none "
            "would go; raise it"
        )
    return count


def _forks(dense: DenseModel, replay: BlockReplay, removed: Collection[int]) -> list[BlockReplay]:
    """Return a replay in front of every block, and one behind the last, without the removed blocks."""
    now, forks = replay.fork(), []
    for block in dense.blocks:
        forks.append(now.fork())
        _advance(dense, now, block, removed)
    return [*forks, now]


def _advance(dense: DenseModel, replay: BlockReplay, block: Block, removed: Collection[int]) -> None:
    if block.index in removed:
        replay.position = block.index + 1
        return
    with dense.resident(block):
        replay.advance(block.index)


def _change(forks: Sequence[BlockReplay], block: Block, cosine: bool) -> float:
    """Return how much a block changes its inputs, as a mean over tokens: relative to its outputs, or by the angle."""
    total, tokens = 0.0, 0
    for before, after in zip(forks[block.index].hidden, forks[block.index + 1].hidden, strict=True):
        if cosine:
            found = 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        else:
            found = relative_token_errors(before, after)
        total, tokens = total + found.sum(dtype=torch.float64).item(), tokens + found.numel()
    return _mean(total, tokens)


def _error(
    dense: DenseModel, forks: Sequence[BlockReplay], index: int, removed: Collection[int], reference: Sequence[Tensor]
) -> float:
    """Return the error of the last block's outputs if a block is removed in addition to others."""
    now = forks[index].fork()
    for block in dense.blocks[index:]:
        _advance(dense, now, block, {*removed, index})
    errors = [relative_token_errors(*pair) for pair in zip(now.hidden, reference, strict=True)]
    return _mean(sum(e.sum(dtype=torch.float64).item() for e in errors), sum(e.numel() for e in errors))


def _mean(total: float, tokens: int) -> float:
    sums = collectives.all_reduce(torch.tensor([total, tokens], dtype=torch.float64))
    return float(sums[0] / sums[1])


def zero(block: Block) -> list[str]:
    """Zero the weights and biases of a block's linear layers; return their names."""
    names = []
    for name, module in block.module.named_modules():
        if isinstance(module, PRUNABLE):
            for own, parameter in module.named_parameters(recurse=False):
                parameter.data.zero_()
                names.append(f"{block.name}.{name}.{own}")
    return names


def report_of(target: Target, gone: bool) -> LayerReport:
    """Return the report of a layer whose block is removed, or left as it is."""
    keep = torch.full(target.shape, not gone)
    return LayerReport(
        name=target.name,
        block=target.block,
        shape=target.shape,
        asked=float(gone),
        reached=float(gone),
        output_error=None,
        seconds=0.0,
        mask=PackedMask.pack(to_parameter_layout(target.module, keep)),
        kept_rows=[] if gone else None,
    )
