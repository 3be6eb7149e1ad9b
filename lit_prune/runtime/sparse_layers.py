"""Inference with torch's sparse tensors, and its speed on this machine."""

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
"""Minimum speed-up of a sparse form; a smaller one is within the noise of the measurement."""


@dataclass(frozen=True)
class Speed:
    """Timing of one layer in dense and in sparse form."""

    layer: str
    """Name of the layer, the first one of its shape."""
    shape: tuple[int, int]
    """Shape of the weight, ``(o, i)``."""
    sparsity: float
    """Fraction of zeros in the weight."""
    tokens: int
    """Number of rows of the input."""
    form: str
    """Name of the sparse form."""
    dense: float
    """Seconds per call in dense form."""
    sparse: float
    """Seconds per call in the sparse form."""

    @property
    def gain(self) -> float:
        """Speed-up of the sparse form, as the ratio of dense to sparse seconds."""
        return self.dense / self.sparse

    @property
    def verdict(self) -> str:
        """Description of the speed-up."""
        return f"{self.gain:.2f} times faster" if self.gain > GAIN else f"no gain ({self.gain:.2f})"


def use_semi_structured(model: nn.Module, masks: Mapping[str, PackedMask]) -> list[str]:
    """Convert the weights of linear layers with a 2:4 mask to torch's semi-structured tensors, in place.

    Args:
        model: model on a CUDA device of compute capability 8.0 or newer, in float16 or bfloat16; for inference only.
        masks: keep masks by parameter name.

    Returns:
        Names of the converted layers.

    Raises:
        InputError: if device or dtype do not support semi-structured sparsity, or no mask is 2:4.
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
    """Return whether a mask keeps at most two of every four consecutive inputs."""
    keep = mask.unpack()
    return keep.dim() == 2 and keep.shape[1] % 4 == 0 and int(keep.reshape(len(keep), -1, 4).sum(-1).max()) <= 2


def measure_speed(
    model: nn.Module, masks: Mapping[str, PackedMask], tokens: Sequence[int] = (1, 16, 256), seconds: float = 0.2
) -> list[Speed]:
    """Time one layer of each shape in dense and sparse form, on the model's device and in its dtype.

    Layers with a 2:4 mask use the semi-structured form if the device supports it; all others use compressed rows.

    Args:
        model: pruned model; not modified.
        masks: keep masks by parameter name.
        tokens: numbers of input rows to time: 1 as in generation, token by token; hundreds as in a prompt.
        seconds: minimum duration of each measurement.

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
    """Return the name of the best sparse form of a weight, and the layer in this form."""
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
    """Return the median seconds per call, on as many threads as torch uses."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
