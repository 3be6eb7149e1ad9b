"""Gradient pass: norms over samples of the gradients of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lit_prune.calibration.batches import Batch, model_inputs, split_batch
from lit_prune.calibration.block_inputs import forwards_replaced
from lit_prune.calibration.replay import ForwardContext, evaluation_mode
from lit_prune.checkpoint.files import load_tensors, save_tensors, tensor_names
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.targets import Target
from lit_prune.ops import collectives
from lit_prune.ops.precision import working
from lit_prune.ops.stats import GradientNorm
from lit_prune.sharding.block_store import BlockStore, store_of
from lit_prune.sharding.parameters import to_parameter_layout


def gradient_norms(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    norm: GradientNorm,
    cache: Path | None = None,
    forward_context: ForwardContext = nullcontext,
    store: BlockStore | None = None,
) -> dict[str, Tensor]:
    """Return the norm over sequences of each target's gradient, ``[o, i]`` float32 or float64, in CPU memory.

    Every sequence is a sample; its loss is the mean cross-entropy of its tokens. The sequences are sharded over the
    processes, and each process gets the norms over all sequences. Each weight's gradient is added to its norm and freed
    as soon as the backward pass has computed it, so the gradients are never all in memory; the activations of a block
    are recomputed in the backward pass.

    Args:
        model: the dense model; its weights, modes and flags are restored.
        batches: calibration batches.
        targets: layers whose gradients to compute.
        norm: ``l1`` for ``Σ |g|``, ``l2`` for ``sqrt(Σ g²)``.
        cache: file to read the result from if it exists, else to write it to; None = no cache.
        forward_context: context manager entered around the forward pass, such as autocast.
        store: store of the blocks; None = the model itself.

    Raises:
        NumericalError: if a gradient is NaN or infinite; names the layer and the sequence.
    """
    if cache is not None and holds_norms(cache, targets):
        known = load_tensors(cache)
        return {target.name: _checked(known[target.name], target, cache) for target in targets}
    store = store or store_of(model)
    weights = {target.name: target.module.get_parameter("weight") for target in targets}
    # At least float32, so that the number of processes does not affect the sums visibly.
    sums = {
        name: torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }
    device = next(model.parameters()).device
    with (
        evaluation_mode(model),
        _only_targets_train(model, targets),
        forwards_replaced(find_blocks(model), partial(_recomputed, store)),
        torch.enable_grad(),
    ):
        for index, sequence, mine in _own_sequences(batches):
            inputs = model_inputs(sequence, device)
            with _adding_gradients(targets, sums if mine else None, norm, index):
                with forward_context():
                    logits = model(**inputs, use_cache=False).logits
                labels = inputs["input_ids"][:, 1:].flatten()
                cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels).backward()
    store.release()
    for total in sums.values():
        collectives.all_reduce(total)
    norms = {
        target.name: to_parameter_layout(target.module, sums[target.name].sqrt() if norm == "l2" else sums[target.name])
        for target in targets
    }
    if cache is not None:
        collectives.on_first_rank(lambda: save_tensors(cache, norms))
    return norms


def holds_norms(cache: Path, targets: Sequence[Target]) -> bool:
    """Return whether a file contains the norms of all these layers; every rank gets the result of rank 0."""
    names = {target.name for target in targets}
    return collectives.on_first_rank(lambda: cache.is_file() and names <= tensor_names(cache))


def _checked(norm: Tensor, target: Target, cache: Path) -> Tensor:
    """Return a layer's norm from a cache; raise ``InputError`` if it is invalid."""
    if norm.shape != target.shape or not norm.is_floating_point() or bool((norm < 0).any()):
        raise InputError(
            f"{str(cache)!r} is damaged: the gradient norms of {target.name} must be {list(target.shape)} numbers "
            "from 0 up; delete the file, and it is made again"
        )
    return norm


def _own_sequences(batches: Sequence[Batch]) -> Iterator[tuple[int, Batch, bool]]:
    """Yield this process's sequences: the global index, the sequence, and whether its gradients are to be used.

    Every process gets the same number of sequences, because they may have to gather weights together; if the sequences
    do not divide evenly, some processes get a last sequence whose gradients are dropped.
    """
    sequences = [sequence for batch in batches for sequence in split_batch(batch, 1)]
    for first in range(0, len(sequences), collectives.world_size()):
        index = first + collectives.rank()
        mine = index < len(sequences)
        yield index, sequences[index if mine else -1], mine


@contextmanager
def _adding_gradients(
    targets: Sequence[Target], sums: dict[str, Tensor] | None, norm: GradientNorm, sequence: int
) -> Iterator[None]:
    """Add every target's gradient to its sum (None = drop it); raise on every process if a gradient is not finite."""
    bad: list[NumericalError] = []

    def adder(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = working(parameter.grad)
            size = gradient.square() if norm == "l2" else gradient.abs()
            parameter.grad = None
            if not size.isfinite().all():
                bad.append(
                    NumericalError(f"the gradient of {name} holds NaN or Inf on calibration sequence {sequence}")
                )
            if sums is not None:
                sums[name] += size.cpu()

        return add

    handles = [
        target.module.get_parameter("weight").register_post_accumulate_grad_hook(adder(target.name))
        for target in targets
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    collectives.raise_first(collectives.gather(bad[0] if bad else None))


@contextmanager
def _only_targets_train(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Enable gradients of the targets only; restore flags and gradients on exit."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    wanted = {target.module.get_parameter("weight") for target in targets}
    for parameter in before:
        parameter.grad = None
        parameter.requires_grad_(parameter in wanted)
    try:
        yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _recomputed(store: BlockStore, block: Block) -> Callable[..., Any]:
    """Return the block's forward with weights loaded on demand and activations recomputed in the backward pass."""
    original = block.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        store.hold(block)
        return original(*args, **kwargs)

    return partial(checkpoint, forward, use_reentrant=False)
