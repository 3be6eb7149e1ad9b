"""Recording of a model's calls of its decoder blocks, from its own forward pass with the blocks stubbed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.sharding.block_store import BlockStore


@dataclass
class Call:
    """Arguments of a block's call, without the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Call:
        """Return a copy with its tensors on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        return Call(_map_tensors(self.args, move), _map_tensors(self.kwargs, move))


class Recorder:
    """Runs a model without its blocks, and records the arguments of each block's call."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], store: BlockStore) -> None:
        """Prepare to record the calls of ``blocks`` of ``model``, whose weights are in ``store``."""
        self._model = model
        self._blocks = blocks
        self._store = store
        self._behind: dict[type, tuple[Any, ...] | None] = {}  # outputs after the hidden states, by block class
        self._known: list[Call] = []  # calls of the latest batch

    def record(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """Return the hidden states before the first block, and the recorded call of every block."""
        calls: list[Call] = []
        first: list[Tensor] = []

        def stub(block: Block) -> Callable[..., Any]:
            original = block.module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split_hidden(block, args, kwargs)
                calls.append(call)
                first.append(hidden)
                if len(calls) == len(self._blocks):
                    raise _Reached
                return self._returned(block, original, hidden, call)

            return forward

        with forwards_replaced(self._blocks, stub), suppress(_Reached):
            self._model(**inputs, use_cache=False)
        if len(calls) != len(self._blocks):
            raise InputError(f"the model called {len(calls)} of its {len(self._blocks)} blocks: it cannot be replayed")
        pool = _Pool(self._known)
        self._known = [Call(pool.intern(call.args), pool.intern(call.kwargs)) for call in calls]
        return first[0], self._known

    def _returned(self, block: Block, original: Callable[..., Any], hidden: Tensor, call: Call) -> Any:
        """Return a block's input in the form of its output; one block of each class runs once to determine the form."""
        kind = type(block.module)
        if kind not in self._behind:
            with self._store.resident(block, hidden.device):
                output = original(hidden, *call.args, **call.kwargs)
            self._behind[kind] = output[1:] if isinstance(output, tuple) else None
        behind = self._behind[kind]
        return hidden if behind is None else (hidden, *behind)


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Stops the model's forward pass once the last block has been called."""


class _Pool:
    """Deduplicates equal tensors, so that a mask is stored once instead of once per batch."""

    def __init__(self, held: Sequence[Call]) -> None:
        self._held: list[Tensor] = []
        for call in held:
            self._add(call.args)
            self._add(call.kwargs)
        self._known: dict[int, Tensor] = {}

    def _add(self, value: Any) -> None:
        for tensor in _tensors(value):
            if not any(tensor is other for other in self._held):
                self._held.append(tensor)

    def intern(self, value: Any) -> Any:
        return _map_tensors(value, self._equal)

    def _equal(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._known:
            same = (t for t in self._held if t.shape == tensor.shape and t.dtype == tensor.dtype)
            self._known[id(tensor)] = next((t for t in same if torch.equal(t, tensor)), tensor)
        return self._known[id(tensor)]


@contextmanager
def forwards_replaced(blocks: Sequence[Block], stub: Callable[[Block], Callable[..., Any]]) -> Iterator[None]:
    """Replace each block's forward by ``stub(block)`` within the context."""
    for block in blocks:
        block.module.forward = stub(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


def _split_hidden(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    if "hidden_states" not in kwargs:
        raise InputError(f"{block.name} is called without hidden states: {sorted(kwargs)}")
    return kwargs["hidden_states"], Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(value, add)
    return found
