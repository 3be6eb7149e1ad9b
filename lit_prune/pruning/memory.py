"""Memory of a run in addition to the model, and the choice of how blocks are calibrated if it is short."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import psutil
import torch
from torch import nn

from lit_prune.calibration.batches import Batch, count_tokens
from lit_prune.models.targets import Target
from lit_prune.ops import collectives
from lit_prune.pruning.plan import PruningPlan


def choose_passes(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch], plan: PruningPlan
) -> PruningPlan:
    """Return the plan with ``sequential`` set, if the plan leaves a choice; the same on every rank.

    It becomes true, or false if the activations that wait in a block exceed the free memory. In that case,
    ``residual_correction``, which needs them, becomes 0, and a warning tells of both.

    Args:
        model: model to prune.
        targets: layers to prune.
        batches: all calibration batches.
        plan: pruning plan.
    """
    if plan.sequential is not None or plan.propagate == "dense" or not plan.needs_replay or not batches:
        return plan
    free = free_memory(torch.device(plan.device or next(model.parameters()).device))
    needed = _waiting_memory(model, {target.name: target.shape[1] for target in targets}, batches, plan)
    if not any(collectives.gather(free is not None and needed > free)):
        return replace(plan, sequential=True)
    without = " and plan.residual_correction 0" if plan.residual_correction else ""
    warnings.warn(
        f"one pass through each block needs {needed / 1e9:.2g} GB for the activations of the calibration set, and "
        f"{(free or 0) / 1e9:.2g} GB are free: blocks are passed twice (plan.sequential is false{without}), which "
        "takes longer and prunes less accurately; lower data.sequences or data.seqlen",
        stacklevel=2,
    )
    return replace(plan, sequential=False, residual_correction=0.0)


def _waiting_memory(model: nn.Module, inputs: Mapping[str, int], batches: Sequence[Batch], plan: PruningPlan) -> int:
    """Return the bytes of the activations that wait in front of a layer in one pass over all of a block's batches.

    They are the residual stream, the normed hidden states and the layer's inputs, and as much as the inputs of the
    layers before it, which are freed, but whose memory is too scattered to hold inputs of another size.

    Args:
        model: model to prune.
        inputs: number of inputs of layers by name; of layers that share an input, one is enough, and of layers whose
            names differ only in numbers, such as experts and blocks, one is counted.
        batches: all calibration batches.
        plan: pruning plan.
    """
    tokens = sum(map(count_tokens, batches)) // collectives.world_size()
    width = getattr(model.config, "hidden_size", 0)
    kinds = {re.sub(r"\d+", "", name): count for name, count in inputs.items()}
    size = next(model.parameters()).element_size()
    return tokens * (2 * width + sum(kinds.values())) * size * (2 if plan.needs_reference else 1)


def count_memory(
    model: nn.Module,
    targets: Sequence[Target],
    groups: Sequence[Sequence[str]],
    batches: Sequence[Batch],
    plan: PruningPlan,
) -> int:
    """Return the peak memory in bytes beyond the model: hidden states, statistics, a solve, and activations.

    The activations are those of one batch, and with ``plan.sequential`` also all that wait in front of a layer.
    """
    sizes = {target.name: target.shape for target in targets}
    weight = next(model.parameters())
    stored = getattr(torch, plan.hidden_dtype).itemsize if plan.hidden_dtype else weight.element_size()
    width = getattr(model.config, "hidden_size", 0)
    tokens = sum(map(count_tokens, batches)) // collectives.world_size()
    at_work = torch.device(plan.device or weight.device)
    elsewhere = torch.device(plan.hidden_device or at_work).type != at_work.type
    hidden = 0 if elsewhere else tokens * width * stored * (2 if plan.needs_reference else 1)
    batch = max(map(count_tokens, batches))
    activations = batch * sum(outputs + inputs for outputs, inputs in sizes.values()) * weight.element_size()
    if plan.sequential:
        hidden += _waiting_memory(model, {group[0]: sizes[group[0]][1] for group in groups}, batches, plan)
    if "gram" not in plan.needs:
        return hidden + activations
    squares = [sizes[group[0]][1] ** 2 for group in groups]
    statistics = sum(squares) * 4 * (2 if plan.correction else 1)
    if plan.residual_correction:  # of the layers that may write to the residual stream
        statistics += 4 * sum(prod(size) for size in sizes.values() if size[0] == width)
    solve = 4 * (4 * max(squares) + 6 * max(prod(size) for size in sizes.values()))
    return hidden + statistics + max(activations, solve)


def count_gradient_memory(targets: Sequence[Target], plan: PruningPlan) -> int:
    """Return the CPU memory in bytes of the gradient norms of all targets; 0 if the scorer needs none."""
    if plan.scorer is None or "gradient" not in plan.scorer.needs:
        return 0
    return 4 * sum(prod(target.shape) for target in targets)


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if it is neither a CPU nor a CUDA GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None
