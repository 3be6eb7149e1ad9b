"""Low-rank adapters that leave pruned weights at zero.

A layer with an adapter has the effective weight ``W + M ⊙ (B A) · scale``, where ``M`` is its keep mask. The mask is
applied to the product, so the sum can be merged into one weight that is exactly as sparse as ``W`` and has the same
outputs.

A plain adapter has no mask: ``W`` stays sparse, and the adapter is never merged into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.ops import PackedMask


class Adapted(nn.Module):
    """A linear layer with a masked or plain low-rank adapter; ``adapt`` converts a linear layer in place.

    The parameter ``weight`` keeps its name and its values, so masks and state dicts of the plain model still apply.
    """

    weight: Any
    """Frozen weight ``[o, i]``; for Conv1D ``[i, o]``."""
    bias: Any
    lora_a: nn.Parameter
    """Matrix A of the adapter, ``[rank, i]``, float32."""
    lora_b: nn.Parameter
    """Matrix B of the adapter, ``[o, rank]``, float32; initialized to zero, so that the adapter has no effect at
    first."""
    keep_bits: Tensor | None
    """Packed keep mask in the layout of ``weight``: uint8, one bit per weight; None = a plain adapter."""
    lora_scale: float
    lora_rank: int
    keep_shape: tuple[int, ...]
    """Shape of the full weight in its own layout, stored because a sharded parameter may not report it."""
    without: type[nn.Module]
    """Class of the layer without its adapter."""
    stored_transposed: bool

    @property
    def keep(self) -> PackedMask | None:
        """Keep mask in the layout of ``weight``; None for a plain adapter."""
        return None if self.keep_bits is None else PackedMask(self.keep_bits, self.keep_shape)

    def masked_weight(self, keep: PackedMask) -> Tensor:
        """Return ``W + M ⊙ (B A) · scale`` in the layout and dtype of ``weight``."""
        change = self.lora_b @ (self.lora_a * self.lora_scale)
        change = change.T if self.stored_transposed else change
        return self.weight + change.masked_fill(~keep.unpack(), 0.0).to(self.weight.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs ``[..., o]`` for ``inputs`` ``[..., i]``."""
        linear = nn.functional.linear
        weight = self.weight if self.keep is None else self.masked_weight(self.keep)
        outputs = linear(inputs, weight.T if self.stored_transposed else weight, self.bias)
        if self.keep is not None:
            return outputs
        change = linear(linear(inputs.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return outputs + (self.lora_scale * change).to(outputs.dtype)


class AdaptedLinear(Adapted, nn.Linear):
    """``nn.Linear`` with an adapter."""

    without = nn.Linear
    stored_transposed = False


class AdaptedConv1D(Adapted, Conv1D):
    """GPT-2's linear layer with an adapter."""

    without = Conv1D
    stored_transposed = True


def adapt(layer: nn.Module, rank: int, scale: float, keep: PackedMask | None) -> None:
    """Add an adapter to a linear layer in place, and freeze the layer's weight.

    Args:
        layer: ``nn.Linear`` or GPT-2's ``Conv1D``.
        rank: rank of the adapter, which adds ``rank (o + i)`` parameters.
        scale: factor of the product ``B A``.
        keep: keep mask in the layout of the parameter; None = a plain adapter.

    Raises:
        InputError: if the layer is of another type, whose own forward pass the adapter would replace.
    """
    adapted: Any = next((kind for kind in (AdaptedLinear, AdaptedConv1D) if type(layer) is kind.without), None)
    if adapted is None:
        raise InputError(f"a layer is a {type(layer).__name__}: adapters go on nn.Linear and Conv1D; exclude it")
    weight = layer.get_parameter("weight").requires_grad_(False)
    outputs, inputs = weight.shape[::-1] if adapted.stored_transposed else weight.shape
    options: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
    layer.lora_a = nn.Parameter(torch.empty(rank, inputs, **options))
    layer.lora_b = nn.Parameter(torch.zeros(outputs, rank, **options))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    layer.register_buffer("keep_bits", None if keep is None else keep.bits)
    layer.__class__ = adapted
    layer.lora_rank, layer.lora_scale, layer.keep_shape = rank, scale, tuple(weight.shape)  # type: ignore[assignment]


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return the layers with adapters, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def copy_adapters(model: nn.Module, plain: nn.Module) -> None:
    """Add adapters of the same form as in ``model``, but with other values, to a plain copy of it."""
    for name, layer in adapted_layers(model).items():
        adapt(plain.get_submodule(name), layer.lora_rank, layer.lora_scale, layer.keep)


def mask_adapters(model: nn.Module, masks: Mapping[str, PackedMask]) -> None:
    """Set the masks of the adapters to ``masks`` (by parameter name)."""
    for name, layer in adapted_layers(model).items():
        if layer.keep_bits is not None and f"{name}.weight" in masks:
            layer.keep_bits.copy_(masks[f"{name}.weight"].bits)


def unmasked_adapter(model: nn.Module, masks: Mapping[str, PackedMask]) -> str | None:
    """Return the name of the first layer whose adapter has another mask than in ``masks`` (by parameter name)."""
    for name, layer in adapted_layers(model).items():
        mask = masks.get(f"{name}.weight")
        if (
            mask is not None
            and layer.keep_bits is not None
            and not torch.equal(layer.keep_bits, mask.bits.to(layer.keep_bits.device))
        ):
            return name
    return None


@contextmanager
@torch.no_grad()
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model with masked adapters merged and plain adapters removed; restore the model on exit.

    The weights must be unsharded; weights with an adapter take twice the memory within the context.
    """
    undo = []
    for layer in adapted_layers(model).values():
        base, adapter, kind = layer.weight.detach().clone(), (layer.lora_a, layer.lora_b, layer.keep_bits), type(layer)
        if layer.keep is not None:
            layer.weight.copy_(layer.masked_weight(layer.keep))
        del layer.lora_a, layer.lora_b, layer.keep_bits
        layer.__class__ = layer.without  # type: ignore[assignment]
        undo.append((layer, base, adapter, kind))
    try:
        yield model
    finally:
        for layer, base, (lora_a, lora_b, keep_bits), kind in undo:
            layer.weight.copy_(base)
            layer.lora_a, layer.lora_b = lora_a, lora_b
            layer.register_buffer("keep_bits", keep_bits)
            layer.__class__ = kind
