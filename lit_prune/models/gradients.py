"""The gradient pass: norms over samples of the gradients of the dense model."""

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

from lit_prune.errors import NumericalError
from lit_prune.models.access import to_parameter_layout
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.calibrate import Batch, ForwardContext, evaluation_mode, forwards_replaced, model_inputs
from lit_prune.models.io import data_fingerprint, load_tensors, model_fingerprint, save_tensors
from lit_prune.models.targets import Target
from lit_prune.ops.stats import GradientNorm


def gradient_norms(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    norm: GradientNorm,
    cache: str | Path | None = None,
    forward_context: ForwardContext = nullcontext,
) -> dict[str, Tensor]:
    """Return the norm over sequences of each target's gradient, ``[o, i]`` float32 in CPU memory, by layer name.

    Every sequence is a sample: its loss is the mean cross-entropy of its tokens. Each weight's gradient is added to its
    norm and dropped as soon as the backward pass has made it, so the gradients are never held as a whole; the
    activations of a block are recomputed when the backward pass comes to it.

    Args:
        model: the dense model; its weights, modes and flags are left as they were.
        batches: calibration batches.
        targets: the layers whose gradients are wanted.
        norm: ``l1`` for ``Σ |g|``, ``l2`` for ``sqrt(Σ g²)``.
        cache: folder where the result is kept under the fingerprints of model and data; None = nowhere.
        forward_context: entered around the forward pass, such as autocast.

    Raises:
        NumericalError: where a gradient is NaN or infinite; it names layer and sequence.
    """
    if cache is not None:
        path = Path(cache) / f"gradients-{norm}-{model_fingerprint(model)}-{data_fingerprint(batches)}.safetensors"
        if path.is_file() and {t.name for t in targets} <= (found := load_tensors(path)).keys():
            return {target.name: found[target.name] for target in targets}
    sums = {target.name: torch.zeros(target.module.get_parameter("weight").shape) for target in targets}
    home = next(model.parameters()).device
    with (
        evaluation_mode(model),
        _only_targets_train(model, targets),
        forwards_replaced(find_blocks(model), _recomputed),
        torch.enable_grad(),
    ):
        for index, inputs in enumerate(_sequences(batches, home)):
            with _adding_gradients(targets, sums, norm, index):
                with forward_context():
                    logits = model(**inputs, use_cache=False).logits
                labels = inputs["input_ids"][:, 1:].flatten()
                cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels).backward()
    norms = {
        target.name: to_parameter_layout(target.module, sums[target.name].sqrt() if norm == "l2" else sums[target.name])
        for target in targets
    }
    if cache is not None:
        save_tensors(path, norms)
    return norms


def _sequences(batches: Sequence[Batch], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        inputs = model_inputs(batch, device)
        for row in range(len(inputs["input_ids"])):
            yield {name: value[row : row + 1] for name, value in inputs.items()}


@contextmanager
def _adding_gradients(
    targets: Sequence[Target], sums: dict[str, Tensor], norm: GradientNorm, sequence: int
) -> Iterator[None]:
    def adder(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            size = parameter.grad.float().square() if norm == "l2" else parameter.grad.float().abs()
            parameter.grad = None
            if not size.isfinite().all():
                raise NumericalError(f"the gradient of {name} holds NaN or Inf on calibration sequence {sequence}")
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


@contextmanager
def _only_targets_train(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Ask for the targets' gradients alone; put flags and gradients back afterwards."""
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


def _recomputed(block: Block) -> Callable[..., Any]:
    """Return the block's forward with its activations recomputed in the backward pass."""
    return partial(checkpoint, block.module.forward, use_reentrant=False)
