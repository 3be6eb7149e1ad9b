"""Storage of a model's blocks while they are not in use: in memory, sharded over ranks, or on disk (``offload.py``).

A block is made ``resident`` for computation. A *skeleton* is a model whose parameters outside the blocks are loaded,
while a parameter inside a block is a placeholder until the block is resident: it has its shape and dtype, but a single
NaN as storage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.lora import copy_adapters
from lit_prune.sharding.parameters import copy_buffers, full_tensor_of, is_managed, unsharded_twin, write_full_tensor

Result = TypeVar("Result")


class BlockStore(ABC):
    """Loads blocks onto a device, one at a time, and writes their changed parameters back."""

    prefetches = False
    """Whether a block can be loaded in another thread while the previous block computes."""
    low_memory = False
    """Whether a block must be released from memory before the next one is loaded."""

    def __init__(self) -> None:
        """Initialize with no block resident."""
        self._resident: int | None = None
        self._held = ExitStack()
        self._background: ThreadPoolExecutor | None = None
        self._fetched: tuple[int, Future[dict[str, Tensor]]] | None = None

    def parts(self, model: nn.Module) -> list[Block]:
        """Return the modules that can be made resident: the blocks, and other modules with weights stored elsewhere."""
        return find_blocks(model)

    @abstractmethod
    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """Return the block's parameters on ``device``, by name within the block, except those already there."""

    @abstractmethod
    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Write changed values of the block's parameters, by name within the block, after it was resident."""

    @contextmanager
    def resident(
        self, block: Block, device: torch.device | str | None = None, then: Block | None = None
    ) -> Iterator[set[str]]:
        """Load a block's weights onto ``device``; yield a set to which the caller adds the names of changed parameters.

        Args:
            block: block to load.
            device: destination; None = the model's device.
            then: next block, to prefetch if the store supports that; None = no prefetch.
        """
        self.release()
        tensors = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
        to = torch.device(device) if device is not None else next(iter(tensors.values())).device
        if to.type == "cuda" and to.index is None:  # other threads may have another current device
            to = torch.device("cuda", torch.cuda.current_device())
        stored = {name: tensor.data for name, tensor in tensors.items()}
        values = self._fetch(block, to)
        if then is not None and self.prefetches:
            self._prefetch(then, to)
        for name, value in values.items():
            tensors[name].data = value
        self._resident = block.index
        changed: set[str] = set()
        try:
            yield changed
            local = [name.removeprefix(f"{block.name}.") for name in changed]
            new = {name: tensors[name].data for name in local}
        finally:
            self._resident = None
            for name in values:
                tensors[name].data = stored[name]
        if new:
            self.store(block, new)

    def hold(self, block: Block) -> None:
        """Keep a block resident on the model's device until another one is needed, for forward passes of the model."""
        if self._resident != block.index:
            self.release()
            self._held.enter_context(self.resident(block))

    def release(self) -> None:
        """Release the block that ``hold`` keeps resident."""
        self._held.pop_all().close()

    def close(self) -> None:
        """Release every block, including a prefetched one."""
        self.release()
        self._fetched = None

    def _fetch(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        fetched, self._fetched = self._fetched, None
        if fetched is None:
            return self._load(block, device)
        values = fetched[1].result()
        if fetched[0] != block.index:
            return self._load(block, device)
        if device.type == "cuda":  # allocated on the stream of the other thread
            for value in values.values():
                value.record_stream(torch.cuda.current_stream(device))
        return values

    def _prefetch(self, block: Block, device: torch.device) -> None:
        self._fetched = (block.index, self._in_background(self._load_apart, block, device))

    def _in_background(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        self._background = self._background or ThreadPoolExecutor(1)
        return self._background.submit(function, *args)

    def _load_apart(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        if device.type != "cuda":
            return self._load(block, device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            values = self._load(block, device)
        stream.synchronize()
        return values

    @torch.no_grad()
    def _load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        buffers = {name: buffer.to(device) for name, buffer in block.module.named_buffers() if buffer.device != device}
        return {**buffers, **self.load(block, device)}


class InMemory(BlockStore):
    """Store for a model with its weights in memory; they are copied only to compute on another device."""

    prefetches = True

    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """Return copies of the parameters that are on another device."""
        parameters = block.module.named_parameters()
        return {name: p.data.to(device, non_blocking=True) for name, p in parameters if p.device != device}

    @torch.no_grad()
    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Copy values changed on another device back into the model."""
        for name, value in values.items():
            parameter = block.module.get_parameter(name)
            if parameter.data_ptr() != value.data_ptr():
                parameter.copy_(value)


class Sharded(BlockStore):
    """Store for weights sharded over ranks by a training strategy; a block is all-gathered when it is made resident.

    Float32 master weights are read if there are any. Every rank must make the same blocks resident, in the same order,
    and store the same values.
    """

    def __init__(self, live: nn.Module, dtype: torch.dtype) -> None:
        """Store the sharded model ``live`` and the dtype in which to gather its weights."""
        super().__init__()
        self._live = live
        self._dtype = dtype

    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """All-gather the block's parameters."""
        names = [name for name, _ in block.module.named_parameters()]
        live = self._live.get_parameter
        return {name: full_tensor_of(live(f"{block.name}.{name}")).to(device, self._dtype) for name in names}

    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Write each rank's shard of the new values."""
        for name, value in values.items():
            parameter = self._live.get_parameter(f"{block.name}.{name}")
            write_full_tensor(parameter, value.to(parameter.device))


@contextmanager
def unsharded(model: nn.Module) -> Iterator[tuple[nn.Module, BlockStore]]:
    """Yield a model whose parameters are plain tensors, and the store of its blocks.

    The model is ``model`` itself, or a skeleton of it if a strategy shards its weights.
    """
    managed = any(is_managed(parameter) for parameter in model.parameters())
    whole, store = _skeleton(model) if managed else (model, store_of(model))
    try:
        yield whole, store
    finally:
        store.close()


def store_of(model: nn.Module) -> BlockStore:
    """Return the block store of a model with plain parameters."""
    return cast(BlockStore, model.__dict__.get("block_store", None) or InMemory())


def fill_outside_blocks(
    model: nn.Module,
    store: BlockStore,
    values: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Turn a model on the meta device into a skeleton: load the parameters outside its blocks.

    Args:
        model: model built under ``init_empty_weights``.
        store: store of the model's blocks, which is attached to the model.
        values: function that returns the values of a parameter, by name.
        dtype: dtype of all parameters; None = as in the model.
        device: device of all parameters; None = CPU.
    """
    within = {id(p) for part in store.parts(model) for p in part.module.parameters()}
    places = _places(model.modules())
    for name, parameter in list(model.named_parameters()):
        if id(parameter) in within:
            data = torch.full((), float("nan"), dtype=dtype or parameter.dtype, device=device).expand(parameter.shape)
        else:
            data = values(name).to(device, dtype or parameter.dtype)
        new = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for module, own in places[id(parameter)]:
            module._parameters[own] = new
    model.__dict__["block_store"] = store


def _skeleton(live: nn.Module) -> tuple[nn.Module, BlockStore]:
    with init_empty_weights(include_buffers=False):
        copy: Any = unsharded_twin(live)
        copy_adapters(live, copy)
    copy.tie_weights()  # so far, each tied name has a separate empty parameter
    first = full_tensor_of(next(live.parameters()))
    store = Sharded(live, first.dtype)
    fill_outside_blocks(copy, store, lambda name: full_tensor_of(live.get_parameter(name)), first.dtype, first.device)
    copy_buffers(live, copy)
    return copy.train(live.training), store


def _places(modules: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules, and names within them, of every parameter by id; tied parameters have several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    return places
