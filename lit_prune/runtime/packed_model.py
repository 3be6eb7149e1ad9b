"""Models with packed weights: conversion, their entry in a config, and the way back to dense weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.checkpoint.packed import PART, entry_of, read_entry
from lit_prune.errors import InputError
from lit_prune.internals.transformers import mark_initialized
from lit_prune.models.blocks import find_blocks
from lit_prune.models.experts import Experts, has_fused_experts
from lit_prune.models.targets import find_targets
from lit_prune.ops import PackedMask
from lit_prune.ops.packing import Kind, float_kind, pack
from lit_prune.runtime.packed_layers import PackedEmbedding, PackedLinear, TiedHead
from lit_prune.sharding.parameters import PRUNABLE, read_weight, to_parameter_layout

Bits = Literal[16, 8, 4]
HeadBits = Literal[16, 8]
_INTEGERS: dict[int, Kind] = {8: "int8", 4: "int4"}


@torch.no_grad()
def pack_model(model: Any, masks: Mapping[str, PackedMask], bits: Bits = 16, head_bits: HeadBits | None = None) -> None:
    """Replace the linear layers of the decoder blocks, the embedding and the head by packed ones, in place.

    >>> pack_model(model, load_masks("out/sparse"), bits=8)  # doctest: +SKIP
    >>> model.save_pretrained("out/packed")  # doctest: +SKIP

    Layers with a mask that prunes anything store their kept weights only; norms, biases and position embeddings stay
    as they are. A head that is tied to the embedding stays so. Values of 8 and 4 bits are rounded to nearest, and stay
    as they are if ``plan.quantize`` has rounded them.

    Args:
        model: causal language model of transformers whose pruned weights are exactly zero.
        masks: keep masks by parameter name; layers without one are packed without leaving anything out.
        bits: bits per kept weight.
        head_bits: bits per weight of embedding and head; None = 16 for 16 bits, else 8.

    Raises:
        InputError: if the model's experts are fused, or it is packed already.
    """
    if has_fused_experts(model) or any(isinstance(module, Experts) for module in model.modules()):
        raise InputError("the model has fused experts, which cannot be packed: export it as bitmask")
    if packed_parts(model):
        raise InputError("the model is packed already")
    head_bits = head_bits or (16 if bits == 16 else 8)
    # Both are asked for before anything is replaced.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    targets = find_targets(model, find_blocks(model))
    for target in targets:
        mask = masks.get(target.parameter)
        keep = None if mask is None or mask.kept == mask.numel else to_parameter_layout(target.module, mask.unpack())
        _replace(model, target.name, _packed_linear(target.module, keep, bits))
    tied: dict[str, str] = {}
    if type(embedding) is nn.Embedding:  # others compute more than a look-up
        names = {id(module): name for name, module in model.named_modules()}
        packed = _packed_embedding(embedding, head_bits)
        _replace(model, names[id(embedding)], packed)
        if isinstance(head, nn.Linear) and head.weight is embedding.weight:
            tied[names[id(head)]] = names[id(embedding)]
            _replace(model, names[id(head)], TiedHead(packed, head.bias))
        elif isinstance(head, nn.Linear):
            _replace(model, names[id(head)], _packed_linear(head, None, head_bits))
    if tied:
        model.config.tie_word_embeddings = False  # transformers ties parameters only
        model.all_tied_weights_keys = {}
    layouts = {
        name: (module.layout, isinstance(module, PackedLinear) and module.transposed)
        for name, module in packed_parts(model).items()
    }
    setattr(model.config, PART, entry_of(layouts, tied))


def packed_parts(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """Return the modules with a packed weight, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (PackedLinear, PackedEmbedding))}


def prepare(model: Any) -> None:
    """Replace the layers of a model on the meta device by packed ones, as the model's config says, in place.

    Raises:
        InputError: if the config's entry is damaged, of another version, or of another model.
    """
    layouts, tied = read_entry(getattr(model.config, PART, None))
    modules = dict(model.named_modules())
    for name, layout in layouts.items():
        module: Any = modules.get(name)
        if not isinstance(module, PRUNABLE) and type(module) is not nn.Embedding:
            raise InputError(f"config.json has a packed layer {name!r}, which the model does not have")
        if isinstance(module, nn.Embedding) and (layout.masked or layout.kind == "int4"):
            raise InputError(f"config.json has a packed embedding {name!r} with a mask or 4 bits: neither is possible")
        shape = to_parameter_layout(module, module.weight).shape
        if any(size > own for size, own in zip(layout.shape, shape, strict=True)):
            raise InputError(f"config.json gives {name!r} the shape {list(layout.shape)}, larger than {list(shape)}")
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        if not (*parent.parameters(recurse=False), *parent.buffers(recurse=False)):
            mark_initialized(parent)  # GPT-2's attention initializes the weight of a layer within it
        if isinstance(module, nn.Embedding):
            _replace(model, name, PackedEmbedding(layout, module.weight.dtype, module.weight.device))
        else:
            bias: nn.Parameter | None = getattr(module, "bias", None)
            bias = None if bias is None else nn.Parameter(bias[: layout.shape[0]].clone())
            _replace(model, name, PackedLinear(layout, bias, isinstance(module, Conv1D), module.weight.device))
    modules |= packed_parts(model)
    for head, source in tied.items():
        embedding = modules.get(source)
        layer = modules.get(head)
        if not isinstance(layer, nn.Linear) or not isinstance(embedding, PackedEmbedding):
            raise InputError(f"config.json ties {head!r} to {source!r}: a head and a packed embedding are needed")
        _replace(model, head, TiedHead(embedding, layer.bias))


def check_packed(model: nn.Module) -> None:
    """Raise ``InputError`` if the parts of a loaded weight do not belong together."""
    for name, module in packed_parts(model).items():
        module.check(name)


@torch.no_grad()
def unpack_model(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replace packed layers by dense ones, in place; ties are restored.

    Args:
        model: model with packed layers.
        dtype: dtype of the weights; None = the model's.
    """
    dtype = dtype or model.config.dtype or torch.float32
    heads = list(_heads(model))
    for name, module in packed_parts(model).items():
        weight = nn.Parameter(module.packed.unpack(dtype))
        _replace(model, name, _dense(module, weight))
    for name, head in heads:
        source = model.get_input_embeddings()
        _replace(model, name, _dense(head, source.weight))
    if heads:
        model.config.tie_word_embeddings = True
    vars(model.config).pop(PART, None)


def _packed_linear(module: nn.Module, keep: Tensor | None, bits: int) -> PackedLinear:
    weight = read_weight(module)
    keep = None if keep is None else keep.to(weight.device)
    packed = pack(weight, keep, _INTEGERS.get(bits) or float_kind(weight))
    made = PackedLinear(packed.layout, cast(Any, module).bias, isinstance(module, Conv1D), weight.device)
    made.set(packed)
    return made


def _packed_embedding(module: nn.Embedding, bits: int) -> PackedEmbedding:
    weight = module.weight.detach()
    packed = pack(weight, None, _INTEGERS.get(bits) or float_kind(weight))
    made = PackedEmbedding(packed.layout, weight.dtype, weight.device)
    made.set(packed)
    return made


def _dense(module: Any, weight: nn.Parameter) -> nn.Module:
    """Return the dense module of a packed one."""
    with torch.device("meta"):
        if isinstance(module, PackedEmbedding):
            made: Any = nn.Embedding(module.num_embeddings, module.embedding_dim)
        elif getattr(module, "transposed", False):
            made, weight = Conv1D(module.out_features, module.in_features), nn.Parameter(weight.T.contiguous())
            made.bias = module.bias
        else:
            made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            made.bias = module.bias
    made.weight = weight
    return made.train(module.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), own, module)


def _heads(model: nn.Module) -> Iterator[tuple[str, TiedHead]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TiedHead))
