"""Mixtures of experts: split a layer's experts, which transformers fuses into single tensors, and fuse them again.

After the split, every expert is a pair of linear layers with its own inputs, and so with its own statistics, mask and
sparsity: ``model.layers.0.mlp.experts.3.gate_up_proj``. Masks and reports use these names. On disk the model has the
format of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_prune.internals.transformers import gate_of

_TRAITS = ("has_gate", "has_bias", "is_transposed")
"""Attributes of every module of fused experts that follows the interface of transformers."""


class Expert(nn.Module):
    """One expert: up (and gate) projection, activation, down projection; ``Experts`` calls its two halves."""

    def __init__(self, fused: Any, index: int) -> None:
        """Extract expert ``index`` from a fused module, sharing its memory if the layout allows."""
        super().__init__()
        for name in _matrices(fused):
            weight = getattr(fused, name).data[index]
            bias = getattr(fused, f"{name}_bias").data[index] if fused.has_bias else None
            setattr(self, name, _linear(weight.T.contiguous() if fused.is_transposed else weight, bias))
        # In __dict__, so that the fused module is not registered as a submodule.
        self.__dict__["activate"] = gate_of(fused) if fused.has_gate else fused.act_fn

    def inner(self, hidden: Tensor) -> Tensor:
        """Return the inputs of the down projection ``[t, intermediate]`` for tokens ``[t, hidden]``."""
        up, _ = self.children()
        activate: Any = self.__dict__["activate"]
        return cast(Tensor, activate(up(hidden)))

    def down(self, inner: Tensor) -> Tensor:
        """Return the expert's outputs ``[t, hidden]``."""
        _, down = self.children()
        return cast(Tensor, down(inner))


class Experts(nn.ModuleList):
    """A layer's experts as separate modules, with the call signature of the fused module that they replace."""

    def __init__(self, fused: Any) -> None:
        """Split a fused module, whose tensors are empty until ``refill``."""
        super().__init__(Expert(fused, index) for index in range(len(fused.down_proj)))
        self.train(fused.training)
        self.__dict__["fused"] = fused
        self.__dict__["listeners"] = []
        self.empty_fused()

    def empty_fused(self) -> None:
        """Empty the tensors of the fused module; experts that share its memory keep it alive."""
        for parameter in self.__dict__["fused"].parameters():
            parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def announcing(self, listener: Callable[[Mapping[nn.Module, Tensor]], None]) -> Iterator[None]:
        """Call a function with the inputs of the corresponding layers of all experts, before any of them is called."""
        self.__dict__["listeners"].append(listener)
        try:
            yield
        finally:
            self.__dict__["listeners"].remove(listener)

    def _announce(self, layer: int, inputs: Sequence[Tensor]) -> None:
        layers = [[*expert.children()][layer] for expert in self]
        for listener in self.__dict__["listeners"]:
            listener(dict(zip(layers, inputs, strict=True)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        Every expert runs, even without tokens, so that its gradients are zero instead of missing, and processes with
        sharded weights gather them in the same order.

        Args:
            hidden_states: hidden states ``[t, hidden]``.
            top_k_index: indices ``[t, k]`` of the experts of each token.
            top_k_weights: routing weights ``[t, k]`` of those experts.
        """
        chosen = [torch.where(top_k_index == index) for index in range(len(self))]
        inputs = [hidden_states[token] for token, _ in chosen]
        self._announce(0, inputs)
        inner = [cast(Expert, expert).inner(x) for expert, x in zip(self, inputs, strict=True)]
        self._announce(1, inner)
        result = torch.zeros_like(hidden_states)
        for expert, x, (token, place) in zip(self, inner, chosen, strict=True):
            output = cast(Expert, expert).down(x) * top_k_weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    @torch.no_grad()
    def refill(self) -> nn.Module:
        """Return the fused module with these experts' weights, in its original parameter objects.

        Afterwards the experts share its memory, so that there is only one copy.
        """
        fused: Any = self.__dict__["fused"]
        for name in _matrices(fused):
            layers = [cast(nn.Linear, expert.get_submodule(name)) for expert in self]
            weights = torch.stack([layer.weight.T if fused.is_transposed else layer.weight for layer in layers])
            getattr(fused, name).data = weights
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.data = weight.T if fused.is_transposed else weight
            if fused.has_bias:
                getattr(fused, f"{name}_bias").data = torch.stack([layer.bias for layer in layers])
        fused.train(self.training)
        return cast(nn.Module, fused)


def take_apart(model: nn.Module) -> list[str]:
    """Replace every module of fused experts by ``Experts``, in place; return the module names.

    Experts in any other form are not changed, with a warning.
    """
    found = [name for name, module in model.named_modules() if _is_fused(module)]
    for name in found:
        model.set_submodule(name, Experts(model.get_submodule(name)))
    others = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]
    if others:
        warnings.warn(
            f"{others[0]} and {len(others) - 1} more hold experts in a form that is not known here: they are neither "
            "pruned nor counted",
            stacklevel=2,
        )
    return found


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Split fused experts within the context, and fuse them again on exit."""
    found = take_apart(model)
    try:
        yield
    finally:
        _put_together(model, found)


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Fuse split experts within the context, and restore the same experts on exit, with their parameters and hooks."""
    found = _split(model)
    _put_together(model, found)
    try:
        yield
    finally:
        for name, experts in found.items():
            experts.empty_fused()
            model.set_submodule(name, experts)


def has_fused_experts(model: nn.Module) -> bool:
    """Return whether a model has experts that ``take_apart`` would split."""
    return any(_is_fused(module) for module in model.modules())


def put_together(model: nn.Module, device: torch.device) -> None:
    """Fuse all split experts of a model whose fused tensors are on the meta device; they move to ``device``."""
    found = _split(model)
    for experts in found.values():
        experts.__dict__["fused"].to_empty(device=device)
    _put_together(model, found)


def _put_together(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        model.set_submodule(name, cast(Experts, model.get_submodule(name)).refill())


def _split(model: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def _is_fused(module: nn.Module) -> bool:
    known = all(hasattr(module, trait) for trait in _TRAITS) and hasattr(module, "down_proj")
    return known and not getattr(module, "has_post_expert_norm", False)


def _matrices(fused: Any) -> tuple[str, str]:
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
