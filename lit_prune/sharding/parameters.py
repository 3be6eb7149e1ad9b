"""Read and write access to a weight under any training strategy.

A plain module has one copy of a weight. Under sharded training, each process holds a shard of the weight (FSDP2,
ZeRO-3), of its float32 master (DeepSpeed) and of its optimizer moments (all of them). Only this module knows the
location of these shards; all other code uses full matrices, and ``Shard`` objects to which a full mask is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from lit_prune.internals import deepspeed as internals
from lit_prune.models.experts import Experts, take_apart
from lit_prune.models.lora import copy_adapters
from lit_prune.ops.masks import keep_only

PRUNABLE = (nn.Linear, Conv1D)
"""Module types whose ``weight`` is a matrix of outputs and inputs."""
_VALUES = ("weight", "gathered weight", "master")
"""Values of ``Shard.place`` for the values of a weight; all others are optimizer moments."""


def to_parameter_layout(module: nn.Module, matrix: Tensor) -> Tensor:
    """Convert an ``[o, i]`` tensor to the layout of ``module.weight``, or back (GPT-2's Conv1D stores ``[i, o]``)."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def read_weight(module: nn.Module) -> Tensor:
    """Return a plain module's weight as ``[o, i]``: a view of the parameter, which must not be modified."""
    return to_parameter_layout(module, module.get_parameter("weight").detach())


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace the values of a plain module's weight by ``weight`` ``[o, i]``; the parameter keeps its identity."""
    module.get_parameter("weight").copy_(to_parameter_layout(module, weight))


@contextmanager
def weights_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the modules' weights bit for bit on exit, even after an error."""
    before = [read_weight(module).clone() for module in modules]
    try:
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            write_weight(module, weight)


@dataclass(frozen=True)
class Shard:
    """This process's shard of a parameter, of its master or of one of its optimizer moments."""

    place: str
    """Name of the tensor: ``weight``, ``gathered weight``, ``master``, or the name of an optimizer moment."""
    read: Callable[[], Tensor]
    """Function that returns the values of the shard."""
    write: Callable[[Tensor], Any]
    """Function that replaces the values of the shard."""
    cut: Callable[[Tensor], Tensor]
    """Function that returns the corresponding shard of a full tensor of the parameter's shape."""


def shards(parameter: nn.Parameter, optimizer: Optimizer | None = None) -> Iterator[Shard]:
    """Yield every shard of a parameter that this process holds.

    Args:
        parameter: a plain parameter, a DTensor (FSDP2), or a parameter managed by DeepSpeed (ZeRO-1, -2, -3).
        optimizer: optimizer whose moments to include; not needed for DeepSpeed, whose parameters refer to theirs.
    """
    if _is_zero_3(parameter):
        yield from _zero_3_shards(parameter)
    elif _is_zero(parameter):
        yield _in_place("weight", parameter.data, _whole)
        yield from _zero_shards(parameter)
    else:
        cut = _cut_like(parameter)
        yield _in_place("weight", _local(parameter.data), cut)
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for name, value in state.items():
            # A factored moment (Adafactor) has no entries for single weights.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield _in_place(name, _local(value), cut)


@torch.no_grad()
def zero_pruned(parameter: nn.Parameter, keep: Tensor, optimizer: Optimizer | None = None) -> None:
    """Zero the entries that ``keep`` (bool, the parameter's shape) prunes, in every shard of this process."""
    for share in shards(parameter, optimizer):
        values = share.read()
        share.write(values.masked_fill_(~share.cut(keep).to(values.device), 0.0))


@torch.no_grad()
def count_revived(parameter: nn.Parameter, keep: Tensor, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Return the number of entries that ``keep`` prunes but that are not exactly zero on this process, by place.

    Optimizer state without negative values only scales steps (second moments, Adamax's norms, Rprop's step sizes) and
    does not determine their direction: it cannot move a weight whose gradient is zero, so it is not checked.
    """
    revived = {}
    for share in shards(parameter, optimizer):
        values = share.read()
        if share.place not in _VALUES and bool((values >= 0).all()):
            continue
        revived[share.place] = int(keep_only(values, ~share.cut(keep).to(values.device)).count_nonzero())
    return revived


def is_finite(parameter: nn.Parameter) -> bool:
    """Return whether this process's shard of a parameter holds neither NaN nor Inf."""
    return all(bool(share.read().isfinite().all()) for share in shards(parameter) if share.place == "weight")


def mask_gradient(parameter: nn.Parameter, keep: Tensor) -> None:
    """Zero the gradient of entries that ``keep`` prunes, in this process's shard; a no-op without a gradient."""
    if parameter.grad is not None:
        gradient = _local(parameter.grad)
        gradient.copy_(keep_only(gradient, _cut_like(parameter)(keep).to(gradient.device)))


def sets_sharded_gradients(parameter: nn.Parameter) -> bool:
    """Return whether the strategy (FSDP2) writes the gradient, so that hooks on the parameter never run."""
    return isinstance(parameter, DTensor)


def is_managed(parameter: nn.Parameter) -> bool:
    """Return whether a strategy stores the parameter differently from a plain tensor."""
    return isinstance(parameter, DTensor) or _is_zero(parameter) or _is_zero_3(parameter)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the full, unsharded parameter."""
    return tuple(parameter.ds_shape if _is_zero_3(parameter) else parameter.shape)


@torch.no_grad()
def full_tensor_of(parameter: nn.Parameter) -> Tensor:
    """Gather and return the full tensor, from the float32 master if there is one; every process must call this."""
    if _is_zero_3(parameter):
        with _gathered(parameter):
            live = parameter.detach().clone()
        return _fp32(parameter) if parameter.requires_grad and internals.in_training(parameter) else live
    if _is_zero(parameter):
        return _fp32(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


@torch.no_grad()
def write_full_tensor(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace the values of parameter and float32 master; every process must call this with the same ``value``."""
    for share in shards(parameter):
        if share.place in _VALUES:
            held = share.read()
            share.write(held.copy_(share.cut(value)))


def unsharded_twin(model: nn.Module) -> nn.Module:
    """Return a new model with the same config and modules, with unsharded weights and without adapters."""
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    twin: nn.Module = plain(model.config)
    if any(isinstance(module, Experts) for module in model.modules()):
        take_apart(twin)
    return twin


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are saved in a checkpoint, such as a router's bias, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def copy_buffers(model: nn.Module, twin: nn.Module) -> None:
    """Copy the model's buffers, which no strategy shards, to a twin; buffers may contain learned values."""
    buffers = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        buffer.data = buffers[name].data.clone()


@contextmanager
def full_model(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model with full weights: the model itself, or a gathered copy if a strategy manages its weights.

    The copy has the values of the float32 masters if there are any, and takes the memory of the full model on every
    process. Changes to the copy are not written back; use ``write_full_tensor`` for that.
    """
    if not any(is_managed(parameter) for parameter in model.parameters()):
        yield model
        return
    copy = unsharded_twin(model)
    values = {name: full_tensor_of(parameter) for name, parameter in model.named_parameters()}
    first = next(iter(values.values()))
    copy.to(device=first.device, dtype=first.dtype)
    copy_buffers(model, copy)
    copy_adapters(model, copy)
    for name, parameter in copy.named_parameters():
        parameter.data.copy_(values.pop(name))
    yield copy.train(model.training)


def _in_place(place: str, values: Tensor, cut: Callable[[Tensor], Tensor]) -> Shard:
    return Shard(place, lambda: values, lambda value: None if value is values else values.copy_(value), cut)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut_like(parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
    if not isinstance(parameter, DTensor):
        return _whole
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process already has the full tensor, so nothing is communicated.
    return lambda tensor: distribute_tensor(
        tensor.detach().to(parameter.device), mesh, placements, src_data_rank=None
    ).to_local()


def _is_zero(parameter: nn.Parameter) -> bool:
    return internals.is_managed(parameter)


def _is_zero_3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _gathered(parameter: nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _fp32(parameter: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def _zero_shards(parameter: Any) -> Iterator[Shard]:
    mapping = internals.fragments(parameter)
    if mapping is None:  # the master is on other processes
        return
    address = mapping.lp_fragment_address

    def cut(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).narrow(0, address.start, address.numel)

    yield _in_place("master", mapping.get_hp_fragment(), cut)
    for name in mapping.optim_fragment or {}:  # empty before the first step
        yield _in_place(name, mapping.get_hp_fragment(name), cut)


def _zero_3_shards(parameter: Any) -> Iterator[Shard]:
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    held = parameter.ds_tensor

    def cut(tensor: Tensor) -> Tensor:
        # Shards have equal length, so the last ones may extend beyond the parameter.
        start = held.numel() * distributed.get_rank(parameter.ds_process_group)
        flat = tensor.reshape(-1)[start : start + held.numel()]
        return nn.functional.pad(flat, (0, held.numel() - flat.numel()))

    yield _in_place("weight", held.data, cut)
    if parameter.numel():  # currently gathered, or small enough to stay gathered
        yield _in_place("gathered weight", parameter.data, _whole)
    if not parameter.requires_grad or not internals.in_training(parameter):
        return
    yield Shard(
        "master",
        lambda: safe_get_local_fp32_param(parameter),
        lambda value: safe_set_local_fp32_param(parameter, value),
        cut,
    )
    master, state = internals.state_of_group(parameter)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == master.shape:
            yield Shard(
                name,
                lambda name=name: safe_get_local_optimizer_state(parameter, name),  # type: ignore[misc]
                lambda value, name=name: safe_set_local_optimizer_state(parameter, value, name),  # type: ignore[misc]
                cut,
            )
