"""Errors of the layers of a pruned model, on the outputs of the same layers in the dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

STREAM = "last hidden state"


@torch.inference_mode()
def output_errors(dense: Any, pruned: Any, layers: Sequence[str], batches: Iterable[Tensor]) -> dict[str, float]:
    """Return ``||Y' - Y||² / ||Y||²`` for the outputs Y' of layers in the pruned model and Y in the dense one.

    Both models run as they are, on text that no solver has seen, so a layer's error contains those of its inputs.

    Args:
        dense: dense model.
        pruned: pruned model, in evaluation mode like the dense one.
        layers: names of the layers.
        batches: token ids ``[sequences, t]``.

    Returns:
        mean over the blocks, by the last part of the layers' names, and the error of the last hidden state.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    changes: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name].append(output)

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(keep(name)) for model in (dense, pruned) for name in layers
    ]
    for batch in batches:
        for model in (dense, pruned):
            found[STREAM].append(model(input_ids=batch, output_hidden_states=True).hidden_states[-1])
        for name, (expected, output) in found.items():
            changes[name] += float((output.double() - expected.double()).square().sum())
            sizes[name] += float(expected.double().square().sum())
        found.clear()
    for handle in hooks:
        handle.remove()
    by_kind: dict[str, list[float]] = defaultdict(list)
    for name, change in changes.items():
        by_kind[name.rpartition(".")[2]].append(change / sizes[name])
    return {kind: mean(errors) for kind, errors in by_kind.items()}
