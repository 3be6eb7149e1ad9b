"""Zeros that save time: layers as sparse tensors of torch, and how fast they are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer

from lit_prune.errors import InputError
from lit_prune.models.experts import apart, has_fused_experts
from lit_prune.ops import PackedMask

SEMI_STRUCTURED = "2:4 semi-structured"
CSR = "CSR"
GAIN = 1.05
"""A form that is not faster than this by itself gains nothing: so much is noise."""


@dataclass(frozen=True)
class Speed:
    """How long one layer takes, dense and sparse."""

    layer: str
    """The first layer of its shape."""
    shape: tuple[int, int]
    """``(o, i)``."""
    sparsity: float
    """Fraction of zeros."""
    tokens: int
    """Rows of the input."""
    form: str
    """What the zeros are used through."""
    dense: float
    """Seconds with the zeros multiplied."""
    sparse: float
    """Seconds in the sparse form."""

    @property
    def gain(self) -> float:
        """How many times faster the sparse form is."""
        return self.dense / self.sparse

    @property
    def verdict(self) -> str:
        """The gain in words."""
        return f"{self.gain:.2f} times faster" if self.gain > GAIN else f"no gain ({self.gain:.2f})"


def use_semi_structured(model: nn.Module, masks: Mapping[str, PackedMask]) -> list[str]:
    """Turn every linear layer with a 2:4 mask into a semi-structured tensor of torch, in place; return their names.

    Args:
        model: on a CUDA device of compute capability 8.0 or newer, in float16 or bfloat16; for inference alone.
        masks: keep masks by parameter name.

    Raises:
        InputError: if the device or the dtype cannot do that, or no mask is 2:4.
    """
    if has_fused_experts(model):
        raise InputError("the model's experts are fused: call lit_prune.models.experts.take_apart(model) first")
    layers = {
        name.removesuffix(".weight"): layer
        for name, mask in masks.items()
        if isinstance(layer := model.get_submodule(name.rpartition(".")[0]), nn.Linear) and is_two_of_four(mask)
    }
    if not layers:
        raise InputError("no layer has a 2:4 mask: prune with {class_path: NM, init_args: {keep: 2, of: 4}}")
    weight = next(iter(layers.values())).weight
    if not _has_semi_structured(weight):
        raise InputError(
            f"the model is on {weight.device} in {weight.dtype}: semi-structured layers need a CUDA device of compute "
            "capability 8.0 or newer, and float16 or bfloat16"
        )
    for layer in layers.values():
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return list(layers)


def is_two_of_four(mask: PackedMask) -> bool:
    """Tell whether at most two of every four consecutive inputs are kept."""
    keep = mask.unpack()
    return keep.dim() == 2 and keep.shape[1] % 4 == 0 and int(keep.reshape(len(keep), -1, 4).sum(-1).max()) <= 2


def measure_speed(
    model: nn.Module, masks: Mapping[str, PackedMask], tokens: Sequence[int] = (1, 16, 256), seconds: float = 0.2
) -> list[Speed]:
    """Time one layer of each shape, dense and sparse, on the model's device and in its dtype.

    Layers whose mask is 2:4 are tried semi-structured if the device can; all others as compressed rows.

    Args:
        model: pruned; left as it is.
        masks: keep masks by parameter name.
        tokens: rows of the input: 1 is generation one token at a time, hundreds are a prompt.
        seconds: time to spend on each figure, at least.

    Raises:
        InputError: if no linear layer has a mask, or torch cannot multiply sparse rows in the model's dtype.
    """
    with apart(model):
        found = _time_layers(model, masks, tokens, seconds)
    if not found:
        raise InputError("no linear layer has a mask here, so there is nothing to time")
    return found


def _time_layers(
    model: nn.Module, masks: Mapping[str, PackedMask], tokens: Sequence[int], seconds: float
) -> list[Speed]:
    found, shapes = [], set()
    for name, mask in masks.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) in shapes:
            continue
        outputs, inputs = layer.weight.shape
        shapes.add((outputs, inputs))
        weight = layer.weight.detach()
        form, sparse = _sparse(weight, mask)
        for rows in tokens:
            dense_input = torch.randn(rows, inputs, dtype=weight.dtype, device=weight.device)
            dense_time = _time(lambda x=dense_input, w=weight: linear(x, w), seconds)  # type: ignore[misc]
            sparse_time = _time(lambda x=dense_input, s=sparse: s(x), seconds)  # type: ignore[misc]
            sparsity = 1 - mask.unpack().float().mean().item()
            found.append(
                Speed(name.removesuffix(".weight"), (outputs, inputs), sparsity, rows, form, dense_time, sparse_time)
            )
    return found


def _sparse(weight: Tensor, mask: PackedMask) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name of the best sparse form of a weight, and the layer in it."""
    if is_two_of_four(mask) and _has_semi_structured(weight):
        packed = to_sparse_semi_structured(weight)
        return SEMI_STRUCTURED, lambda x: linear(x, packed)
    if not weight.is_cuda and weight.dtype != torch.float32:
        raise InputError(
            f"the model is in {weight.dtype} on {weight.device}: torch multiplies sparse rows in float32 there"
        )
    rows = weight.to_sparse_csr()
    return CSR, lambda x: (rows @ x.T).T


def _has_semi_structured(weight: Tensor) -> bool:
    return (
        weight.is_cuda
        and weight.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    )


@torch.no_grad()
def _time(call: Callable[[], Tensor], seconds: float) -> float:
    """Return the median seconds of a call, on as many threads as torch uses."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
