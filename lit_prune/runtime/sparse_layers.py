"""Inference with torch's sparse tensors, and the speed of sparse layers on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer

from lit_prune.errors import InputError
from lit_prune.models.experts import apart, has_fused_experts
from lit_prune.ops import PackedMask
from lit_prune.ops.packing import Kind, PackedWeight, float_kind, pack
from lit_prune.runtime.kernel import kernel_on
from lit_prune.runtime.packed_layers import PackedLinear

SEMI_STRUCTURED = "2:4 semi-structured"
CSR = "CSR"
GAIN = 1.05
"""Minimum speed-up of a sparse form; a smaller one is within the noise of the measurement."""
_CACHE = 1 << 26
"""Number of bytes of a layer's copies that are timed in turn, so that weights come from memory, as in a model."""
_MOST_COPIES = 256
"""Maximum number of copies; those of small layers may stay in a large cache."""
Product = Callable[[Tensor], Tensor]


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

    Layers with a 2:4 mask use the semi-structured form if the device supports it. If there is a kernel, other layers
    are packed with 16, 8 and 4 bits per kept weight; without one, they use compressed rows. As in a model, every
    product reads another copy of the weights, for layers of usual sizes from memory and not a cache.

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
        sparsity = 1 - mask.unpack().float().mean().item()
        dense = _copies(lambda w=weight: _dense(w.clone()), weight.nbytes)  # type: ignore[misc]
        for form, (make, size) in _sparse_forms(weight, mask).items():
            sparse = _copies(make, size)
            for rows in tokens:
                x = torch.randn(rows, inputs, dtype=weight.dtype, device=weight.device)
                times = [_time(products, x, seconds) for products in (dense, sparse)]
                found.append(Speed(name.removesuffix(".weight"), (outputs, inputs), sparsity, rows, form, *times))
    return found


def _copies(make: Callable[[], Product], size: int) -> list[Product]:
    """Return as many copies of a layer of ``size`` bytes as a cache does not hold, within reason."""
    return [make() for _ in range(min(-(-_CACHE // size), _MOST_COPIES))]


def _dense(weight: Tensor) -> Product:
    return lambda x: linear(x, weight)


def _sparse_forms(weight: Tensor, mask: PackedMask) -> dict[str, tuple[Callable[[], Product], int]]:
    """Return functions that make a layer in each of its sparse forms, with the number of bytes, by the form's name."""
    if is_two_of_four(mask) and _has_semi_structured(weight):
        return {SEMI_STRUCTURED: (lambda: _dense(to_sparse_semi_structured(weight)), weight.nbytes // 2)}
    if kernel_on(weight.device):
        kinds: dict[str, Kind] = {"16 bits": float_kind(weight), "8 bits": "int8", "4 bits": "int4"}
        packed = {form: pack(weight, mask.unpack(), kind) for form, kind in kinds.items()}
        return {form: (lambda w=w: _packed(w), w.nbytes) for form, w in packed.items()}  # type: ignore[misc]
    return {CSR: (lambda: _compressed_rows(weight), weight.nbytes)}


def _packed(weight: PackedWeight) -> Product:
    layer = PackedLinear(weight.layout)
    layer.set(replace(weight, values=weight.values.clone(), mask=weight.mask.clone()))
    layer.kernel()  # prepared now and not in the first product
    return layer


def _compressed_rows(weight: Tensor) -> Product:
    if weight.device.type not in ("cpu", "cuda"):
        raise InputError(
            f"the model is on {weight.device}: torch has no compressed rows there; time the model as a whole with "
            "--against, or its layers on a CPU with --trainer.accelerator cpu"
        )
    if not weight.is_cuda and weight.dtype != torch.float32:
        raise InputError(
            f"the model is in {weight.dtype} on {weight.device}: torch multiplies sparse rows in float32 there"
        )
    rows = weight.to_sparse_csr()
    return lambda x: (rows @ x.T).T


def _has_semi_structured(weight: Tensor) -> bool:
    return (
        weight.is_cuda
        and weight.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    )


@torch.no_grad()
def _time(products: Sequence[Product], x: Tensor, seconds: float) -> float:
    """Return the median seconds per product, of one copy after the other, on as many threads as torch uses."""
    turn = cycle(products)
    timer = Timer("next(turn)(x)", globals={"turn": turn, "x": x}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
