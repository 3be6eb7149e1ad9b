"""Layers that write to the residual stream: a block's output is its input plus theirs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.replay import BlockReplay
from lit_prune.models.blocks import Block
from lit_prune.ops import collectives

_NEAR = 0.02
"""Maximum distance of a layer's coefficient in the block's output from 0 or 1."""
_SAMPLE = 2**18
"""Number of values that are compared."""
_ROUNDING = 8
"""Maximum error of the sum, in units of the dtype's rounding of all its terms."""


@torch.no_grad()
def residual_writers(replay: BlockReplay, block: Block) -> list[str]:
    """Return the names within the block of the layers whose outputs are added to the residual stream.

    They are found from numbers: the block runs on one batch, and ``output - input`` is fitted by the outputs of its
    layers. Every coefficient must be 0 or 1, and the sum exact to rounding; otherwise, as with a norm behind a layer or
    a router's weights in front of it, there are no such layers, and the list is empty. The same on every rank.
    """
    first = next((batch for batch, hidden in enumerate(replay.hidden) if len(hidden)), None)
    found = None if first is None else _writers(replay, block, first)
    return next((names for names in collectives.gather(found) if names is not None), [])


def _writers(replay: BlockReplay, block: Block, batch: int) -> list[str]:
    written: dict[str, list[Any]] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            written.setdefault(name, []).append(output)

        return keep

    with ExitStack() as stack:
        for name, module in block.module.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                stack.enter_context(module.register_forward_hook(keeper(name)))
        output = replay.run(block.index, batch)
    change = _sample(output) - _sample(replay.hidden[batch].to(output))
    names = [name for name, calls in written.items() if len(calls) == 1 and _is_like(calls[0], output)]
    if not names:
        return []
    terms = torch.stack([_sample(written[name][0]) for name in names], 1)
    coefficients = torch.linalg.lstsq(terms, change[:, None]).solution[:, 0]
    chosen = coefficients > 0.5
    error = (change - terms[:, chosen].sum(1)).norm()
    size = 2 * _sample(output).norm() + change.norm() + terms[:, chosen].norm(dim=0).sum()
    exact = error <= _ROUNDING * torch.finfo(output.dtype).eps * size
    if not exact or ((coefficients - chosen.double()).abs() > _NEAR).any():
        return []
    return [name for name, used in zip(names, chosen.tolist(), strict=True) if used]


def _is_like(written: Any, output: Tensor) -> bool:
    """Return whether a layer's output can be added to the residual stream: ``[sequences, t, hidden]`` or flattened."""
    same = isinstance(written, Tensor) and written.shape[-1] == output.shape[-1]
    return same and written.numel() == output.numel()


def _sample(values: Tensor) -> Tensor:
    return values.flatten()[:_SAMPLE].double()
