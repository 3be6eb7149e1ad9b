"""Cost estimate of a run before it starts: floating-point operations, seconds and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lit_prune.allocators import Measured
from lit_prune.calibration.batches import Batch, count_sequences, count_tokens, first_sequences, split_batch
from lit_prune.calibration.replay import BlockReplay, ForwardContext, evaluation_mode
from lit_prune.models.blocks import Block
from lit_prune.models.experts import apart
from lit_prune.models.targets import Target
from lit_prune.ops import collectives
from lit_prune.ops.timing import seconds_of
from lit_prune.pruning.memory import choose_passes, count_gradient_memory, count_memory, free_memory
from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.units import find_units
from lit_prune.sharding.block_store import InMemory, unsharded


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a run, summed over all processes; a multiply-add counts as two."""

    forward: float
    """Operations of one forward pass of the calibration set through all blocks."""
    passes: float
    """Number of such passes; a backward pass counts as two."""
    gram: float
    """Operations of all Gram matrices, of which only the upper triangle is computed."""
    solve: float
    """Operations of all factorisations and solves."""

    @property
    def total(self) -> float:
        """Total operations of the run."""
        return self.forward * self.passes + self.gram + self.solve


@dataclass(frozen=True)
class Preflight:
    """Cost estimate of a run."""

    work: Work
    """Floating-point operations to perform."""
    seconds: float
    """Estimated duration in seconds, extrapolated from the timing of one block on this machine."""
    memory: int
    """Peak memory in addition to the model, in bytes, on the device that processes the blocks."""
    free: int | None
    """Free memory of that device, in bytes; None if unknown."""
    sequential: bool = False
    """Whether the plan is sequential, so that the activations of the whole calibration set wait at once."""

    @property
    def fits(self) -> bool:
        """Whether the estimated peak fits in the free memory; True if that is unknown."""
        return self.free is None or self.memory <= self.free

    def __str__(self) -> str:
        """Return the estimate as a sentence."""
        text = f"about {_duration(self.seconds)} and {self.memory / 1e9:.2g} GB beyond the model"
        if self.fits or self.free is None:
            return text
        remedy = (
            "plan.sequential to false and plan.residual_correction to 0"
            if self.sequential
            else "plan.hidden_device, plan.hidden_dtype or model.lazy"
        )
        free = f"{self.free / 1e9:.2g} GB are free"
        return f"{text}, of which {free}: lower data.sequences or data.seqlen, or set {remedy}"


@torch.inference_mode(False)
@torch.no_grad()
def preflight(
    model: nn.Module, batches: Sequence[Batch], plan: PruningPlan, forward_context: ForwardContext = nullcontext
) -> Preflight | None:
    """Estimate the cost of ``prune`` with these arguments; None if the plan needs no data and so hardly any time.

    The duration is extrapolated from timing a few sequences in the first block to be pruned.

    Args:
        model: as for ``prune``; not modified.
        batches: all calibration batches.
        plan: pruning plan.
        forward_context: as for ``prune``.
    """
    if not plan.needs_replay or not batches or plan.removes_only_blocks:
        return None
    with unsharded(model) as (whole, store), apart(whole), evaluation_mode(whole):
        blocks, targets = plan.find_targets(whole)
        if units := find_units(whole, blocks, targets, plan, store):
            targets = [target for target in targets if target.name in units.by_consumer]  # the others are not solved
        plan = choose_passes(whole, targets, batches, plan)
        block = blocks[targets[0].block]
        mine = [target for target in targets if target.block == block.index]
        sample = [split_batch(batches[0], plan.reconstruction.sequences)[0] if plan.reconstruction else batches[0]]
        replay = BlockReplay(whole, blocks, sample, plan.device, None, None, forward_context, store, share=False)
        with store.resident(block, plan.device):
            groups = replay.sharing(block.index, {target.name: target.module for target in mine})
            seconds = _fastest(lambda: replay.outputs(block.index))
            rate = _product_rate(next(block.module.parameters()))
        work = count_work(whole, blocks, targets, groups, batches, plan)
        tokens = sum(map(count_tokens, batches))
        forward = seconds * tokens / sum(map(count_tokens, sample)) * len(blocks) * work.passes
        memory = count_memory(whole, mine, groups, batches, plan)
        if plan.device or not isinstance(store, InMemory):  # the current block, and the one being prefetched or written
            memory += 2 * max(sum(p.nbytes for p in part.module.parameters()) for part in store.parts(whole))
        device = torch.device(plan.device or next(whole.parameters()).device)
        if device.type == "cpu":
            memory += count_gradient_memory(targets, plan)
        free = free_memory(device)
        seconds = (forward + (work.gram + work.solve) / rate) / collectives.world_size()
        return Preflight(work, seconds, memory, free, bool(plan.sequential))


def count_work(
    model: nn.Module,
    blocks: Sequence[Block],
    targets: Sequence[Target],
    groups: Sequence[Sequence[str]],
    batches: Sequence[Batch],
    plan: PruningPlan,
) -> Work:
    """Count the floating-point operations of a run.

    Args:
        model: model to prune.
        blocks: decoder blocks of the model.
        targets: layers to prune.
        groups: names of the layers of one block, grouped by shared input.
        batches: all calibration batches.
        plan: pruning plan.
    """
    tokens, observed = (sum(map(count_tokens, part)) for part in (batches, _observed(batches, plan)))
    linear = sum(prod(p.shape) for block in blocks for p in block.module.parameters() if p.dim() == 2)
    length = count_tokens(batches[0]) // count_sequences(batches[0])
    width = getattr(model.config, "hidden_size", 0)
    attention = len(blocks) * 4 * length * width  # q kᵀ and p v over all positions, as torch's flop counter counts
    trials = plan.allocator.trials(plan.pattern) if isinstance(plan.allocator, Measured) else 0
    at_once = plan.propagate == "dense" or (plan.sequential and not plan.reconstruction)
    passes = (1.0 if at_once else 2.0) + plan.needs_reference
    passes += (2 + trials) * observed / tokens if plan.allocator.needs else 0
    passes += 4 if plan.scorer and "gradient" in plan.scorer.needs else 0  # two forward passes and one backward pass
    if plan.reconstruction:
        sequences = sum(map(count_sequences, batches))
        passes += 2 + 3 * plan.reconstruction.steps * plan.reconstruction.sequences / sequences
    sizes = {target.name: target.shape for target in targets}
    gram = solve = 0.0
    for group in groups:
        outputs, inputs = sizes[group[0]]
        if plan.residual_correction and len(group) == 1 and outputs == width:  # it may write to the residual stream
            of_drift = 2 * outputs * inputs
        else:
            of_drift = 2 * inputs**2 * bool(plan.correction)
        of_gram = inputs * (inputs + 1) + of_drift
        of_solve = plan.solver.shared_flops(inputs) + sum(plan.flops(*sizes[name]) for name in group)
        draft = plan.solver.draft()
        trial = draft.shared_flops(inputs) * bool(trials) + trials * sum(draft.flops(*sizes[name]) for name in group)
        gram += (of_gram * tokens + inputs**2 * observed * bool(trials)) if "gram" in plan.needs else 0
        solve += of_solve + trial
    alike = len({target.block for target in targets})
    return Work(tokens * (2.0 * linear + attention), passes, gram * alike, solve * alike)


def _observed(batches: Sequence[Batch], plan: PruningPlan) -> Sequence[Batch]:
    """Return the batches on which the allocator observes the blocks."""
    return first_sequences(batches, plan.allocator.observed_sequences) if plan.allocator.needs else []


def _fastest(work: Callable[[], object], times: int = 2) -> float:
    """Return the duration in seconds of the fastest of several runs, after one warm-up run."""
    work()
    return min(seconds_of(work) for _ in range(times))


def _product_rate(like: Tensor, size: int = 768) -> float:
    """Return the floating-point operations per second of float32 matrix products on the device of a tensor."""
    matrix = torch.ones(size, size, device=like.device)
    return 2 * size**3 / _fastest(lambda: matrix @ matrix)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
