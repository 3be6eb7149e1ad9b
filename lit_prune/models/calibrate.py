"""Block-by-block replay of the calibration set: each block's inputs are known without running the model as a whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import Block
from lit_prune.models.collect import Collector, expert_layers, inputs_kept
from lit_prune.ops import LayerStats
from lit_prune.ops.linalg import relative_token_errors

Batch = Tensor | Mapping[str, Tensor]
"""Token ids ``[sequences, t]``, or the model's keyword arguments with ``input_ids`` among them."""

ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Makes a context manager to run the model in, such as autocast."""


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Stops the model's forward pass once the last block has been called."""


@dataclass
class _Call:
    """How the model called a block, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockReplay:
    """Runs a model's decoder blocks one at a time over all calibration batches.

    The model's own forward pass decides how each block is called: it runs once per batch with the blocks stubbed out,
    which records every block's own arguments (attention masks and rotary embeddings differ by layer in many models).
    After that the object holds the inputs of one block at a time, and ``advance`` moves them through it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        device: torch.device | str | None = None,
        hidden_device: torch.device | str | None = None,
        forward_context: ForwardContext = nullcontext,
    ) -> None:
        """Record how the model calls its blocks, and the inputs of the first one.

        Args:
            model: in evaluation mode.
            blocks: its decoder blocks.
            batches: calibration batches.
            device: where blocks run; None = where the model is.
            hidden_device: where hidden states wait; None = where blocks run.
            forward_context: entered around every forward pass, such as autocast.
        """
        if not batches:
            raise InputError("there are no calibration batches: this method needs data")
        home = next(model.parameters()).device
        self._blocks = blocks
        self._device = torch.device(device) if device is not None else home
        self._hidden_device = torch.device(hidden_device) if hidden_device is not None else self._device
        self._forward_context = forward_context
        self._calls: list[list[_Call]] = [[] for _ in blocks]
        self._hidden: list[Tensor] = []
        inputs = [model_inputs(batch, home) for batch in batches]
        with forward_context():
            outputs = _probe_outputs(model, blocks, inputs[0])
            for batch in inputs:
                self._record(model, batch, outputs)

    def _record(self, model: nn.Module, inputs: dict[str, Tensor], outputs: list[Any]) -> None:
        recorded: list[_Call] = []
        first_hidden: list[Tensor] = []

        def stub(block: Block) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split_hidden(block, args, kwargs)
                recorded.append(call)
                first_hidden.append(hidden)
                if len(recorded) == len(self._blocks):
                    raise _Reached
                return _with_hidden(outputs[block.index], hidden)

            return forward

        with forwards_replaced(self._blocks, stub), suppress(_Reached):
            model(**inputs, use_cache=False)
        if len(recorded) != len(self._blocks):
            raise InputError(
                f"the model called {len(recorded)} of its {len(self._blocks)} blocks: it cannot be replayed"
            )
        pool = _Pool([calls[-1] for calls in self._calls if calls])
        for calls, call in zip(self._calls, recorded, strict=True):
            calls.append(_Call(pool.intern(call.args), pool.intern(call.kwargs)))
        self._hidden.append(first_hidden[0].to(self._hidden_device))

    @torch.no_grad()
    def collect(
        self,
        index: int,
        layers: Mapping[str, nn.Module],
        needs: frozenset[str],
        dense: BlockReplay | None = None,
    ) -> dict[str, LayerStats]:
        """Run block ``index`` once and return the input statistics of its ``layers``.

        Layers that are called with the very same tensor share one ``LayerStats``.

        Args:
            index: a block that has not been pruned yet.
            layers: its layers, by name.
            needs: what to collect.
            dense: stands before the same block with the dense model's hidden states, for ``drift``; it is moved past
                the block.

        Raises:
            InputError: where a layer is never called, so nothing is known about its inputs.
            NumericalError: where activations are NaN or infinite.
        """
        collector = Collector(needs)
        of_experts = {id(layer) for group in expert_layers(self._blocks[index].module) for layer in group}
        # The dense model sends other tokens to an expert, so there is nothing to compare its inputs with.
        compared = {name: layer for name, layer in layers.items() if id(layer) not in of_experts}
        for batch in range(len(self._hidden)):
            collector.sequences = len(self._hidden[batch])
            if dense is not None:
                with inputs_kept(compared, collector.dense_inputs):
                    dense._hidden[batch] = dense._output(index, batch).to(dense._hidden_device)
            with collector.watching(layers):
                self.run(index, batch)
            collector.end_of_batch()
        for name in layers:
            if name not in collector.stats:
                raise InputError(f"{name} was never called on the calibration set: exclude it with plan.exclude")
            collector.stats[name].check_finite(name)
        return collector.stats | self._pooled(index, layers, collector.stats)

    def _pooled(
        self, index: int, layers: Mapping[str, nn.Module], stats: Mapping[str, LayerStats]
    ) -> dict[str, LayerStats]:
        """Return, for experts that saw too few tokens, the statistics of all experts together.

        That is fewer than a Gram matrix has rows. The inputs of an expert's last layer are its own hidden units, which
        have nothing in common with another's: they are pooled only where there are none at all.
        """
        found: dict[str, LayerStats] = {}
        for group in expert_layers(self._blocks[index].module):
            mine = [name for name, layer in layers.items() if any(layer is other for other in group)]
            least = (
                group[0].in_features if mine and mine[0].endswith("up_proj") and "gram" in stats[mine[0]].needs else 1
            )
            scarce = [name for name in mine if stats[name].tokens < least]
            if scarce:
                warnings.warn(
                    f"{len(scarce)} of {len(mine)} experts saw fewer than {least} calibration tokens, "
                    f"{scarce[0]} {stats[scarce[0]].tokens}: they are pruned with the statistics of all, pooled",
                    stacklevel=2,
                )
                found |= dict.fromkeys(scarce, LayerStats.pooled([stats[name] for name in mine]))
        return found

    @property
    def hidden(self) -> Sequence[Tensor]:
        """The hidden states ``[sequences, t, hidden]`` of every batch: what the last block run put out."""
        return self._hidden

    def fork(self) -> BlockReplay:
        """Return another replay that stands where this one does."""
        twin = copy.copy(self)
        twin._hidden, twin._calls = list(self._hidden), list(self._calls)
        return twin

    @torch.no_grad()
    def outputs(self, index: int) -> list[Tensor]:
        """Return the outputs ``[sequences, t, hidden]`` of block ``index`` on every batch."""
        return [self._output(index, batch).to(self._hidden_device) for batch in range(len(self._hidden))]

    @torch.no_grad()
    def output_error(
        self, index: int, outputs: Sequence[Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> float:
        """Return how far block ``index`` is from other ``outputs`` of its: ``mean_t ||change_t||² / ||output_t||²``.

        Args:
            index: the block.
            outputs: such as those of its dense weights, a tensor ``[sequences, t, hidden]`` for every batch.
            parameters: as for ``run``.
        """
        total, tokens = 0.0, 0
        for batch, dense in enumerate(outputs):
            errors = relative_token_errors(self.run(index, batch, parameters), dense.to(self._device))
            total += errors.sum(dtype=torch.float64).item()
            tokens += errors.numel()
        return total / tokens

    @torch.no_grad()
    def advance(self, index: int, outputs: Sequence[Tensor] | None = None) -> None:
        """Replace the hidden states by the outputs of block ``index``, which may be known already."""
        for batch in range(len(self._hidden)):
            output = self._output(index, batch) if outputs is None else outputs[batch]
            self._hidden[batch] = output.to(self._hidden_device)
        self._calls[index] = []  # its masks and embeddings are not needed again

    def _output(self, index: int, batch: int) -> Tensor:
        output = self.run(index, batch)
        if not output.isfinite().all():
            name = self._blocks[index].name
            raise NumericalError(f"the output of {name} holds NaN or Inf on calibration batch {batch}")
        return output

    def run(self, index: int, batch: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output ``[sequences, t, hidden]`` of block ``index`` on one batch.

        Args:
            index: the block that the hidden states stand before.
            batch: index of the batch.
            parameters: take the place of the block's own of these names; gradients flow to them where enabled.
        """
        call = self._calls[index][batch]
        hidden = self._hidden[batch].to(self._device)
        args, kwargs = _move(call.args, self._device), _move(call.kwargs, self._device)
        with self._forward_context():
            output = functional_call(self._blocks[index].module, dict(parameters or {}), (hidden, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def resident(module: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Hold a module on ``device`` (None = where it is), and return it to its home afterwards."""
    home = next(module.parameters()).device
    module.to(device or home)
    try:
        yield
    finally:
        module.to(home)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and compiled code off, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks that are new to compiled code never run in it
            yield
    finally:
        for module in training:
            module.training = True


class _Pool:
    """Replaces tensors by equal ones that are held already, so that a mask is kept once and not once per batch."""

    def __init__(self, held: Sequence[_Call]) -> None:
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


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch as the model's keyword arguments on ``device``; raise ``InputError`` where it is padded."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise InputError("a calibration batch is padded (attention_mask has zeros): cut whole sequences instead")
    return {name: value.to(device) for name, value in inputs.items()}


def count_sequences(batch: Batch) -> int:
    """Return the number of sequences in a batch."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def split_batch(batch: Batch, sequences: int) -> list[Batch]:
    """Return a batch as batches of ``sequences`` sequences, or fewer in the last one."""
    if isinstance(batch, Tensor):
        return list(batch.split(sequences))
    parts = {name: value.split(sequences) for name, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _probe_outputs(model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Tensor]) -> list[Any]:
    """Run a few tokens through the whole model to learn what each block returns (a tensor, or a tuple around it)."""
    outputs: list[Any] = [None] * len(blocks)

    def remember(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[index] = output

        return hook

    handles = [block.module.register_forward_hook(remember(block.index)) for block in blocks]
    try:
        model(**{name: value[:1, :8] for name, value in inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _split_hidden(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(args[1:], kwargs)
    if "hidden_states" not in kwargs:
        raise InputError(f"{block.name} is called without hidden states: {sorted(kwargs)}")
    return kwargs["hidden_states"], _Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def forwards_replaced(blocks: Sequence[Block], stub: Callable[[Block], Callable[..., Any]]) -> Iterator[None]:
    """Let each block run ``stub(block)`` in place of its own forward."""
    for block in blocks:
        block.module.forward = stub(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


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


def _move(value: Any, device: torch.device) -> Any:
    return _map_tensors(value, lambda tensor: tensor.to(device))
