"""Where the weights of a model's blocks are while nobody works on them: with the model, shared out, or on disk.

A block is made ``resident`` to work on it. A *hollow* model has the structure and everything outside its blocks; a
parameter in a block has its shape and dtype, and one NaN for all of its values, until the block is resident.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lit_prune.models.access import copy_buffers, is_managed, plain_twin, read_whole, write_whole
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.lora import copy_adapters

Result = TypeVar("Result")


class Home(ABC):
    """Brings blocks to where they are worked on, one at a time, and what has changed of them back."""

    ahead = False
    """Whether a block can be fetched in another thread while the one before it is worked on."""
    room_for_one = False
    """Whether a block should be gone from memory before the next one comes."""

    def __init__(self) -> None:
        """Begin with no block resident."""
        self._resident: int | None = None
        self._held = ExitStack()
        self._background: ThreadPoolExecutor | None = None
        self._fetched: tuple[int, Future[dict[str, Tensor]]] | None = None

    def parts(self, model: nn.Module) -> list[Block]:
        """Return what can be made resident: the model's blocks, and whatever else has its weights elsewhere."""
        return find_blocks(model)

    @abstractmethod
    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """Return the values of the block's parameters on ``device``, by name in the block; none for those that stay."""

    @abstractmethod
    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Keep new values of the block's parameters, by name in the block; the block is back home."""

    @contextmanager
    def resident(
        self, block: Block, device: torch.device | str | None = None, then: Block | None = None
    ) -> Iterator[set[str]]:
        """Hold a block's weights on ``device``; yield a set for the names, in the model, of parameters that change.

        Args:
            block: the block.
            device: where to; None = where the model is.
            then: the block that is wanted next, to be fetched in the meantime where that is possible.
        """
        self.let_go()
        tensors = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
        to = torch.device(device) if device is not None else next(iter(tensors.values())).device
        if to.type == "cuda" and to.index is None:  # another thread may have another current device
            to = torch.device("cuda", torch.cuda.current_device())
        at_home = {name: tensor.data for name, tensor in tensors.items()}
        values = self._fetch(block, to)
        if then is not None and self.ahead:
            self._fetch_ahead(then, to)
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
                tensors[name].data = at_home[name]
        if new:
            self.store(block, new)

    def hold(self, block: Block) -> None:
        """Make a block resident where the model is, until another one is: for passes through the whole model."""
        if self._resident != block.index:
            self.let_go()
            self._held.enter_context(self.resident(block))

    def let_go(self) -> None:
        """Let a block that is held go home."""
        self._held.pop_all().close()

    def close(self) -> None:
        """Let go of everything, also of a block that was fetched and never worked on."""
        self.let_go()
        self._fetched = None

    def _fetch(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        fetched, self._fetched = self._fetched, None
        if fetched is None:
            return self._load(block, device)
        values = fetched[1].result()
        if fetched[0] != block.index:
            return self._load(block, device)
        if device.type == "cuda":  # they were allocated for the stream of the other thread
            for value in values.values():
                value.record_stream(torch.cuda.current_stream(device))
        return values

    def _fetch_ahead(self, block: Block, device: torch.device) -> None:
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


class Memory(Home):
    """The model holds its own weights, whole; they move only to be worked on elsewhere."""

    ahead = True

    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """Return copies of what is elsewhere."""
        parameters = block.module.named_parameters()
        return {name: p.data.to(device, non_blocking=True) for name, p in parameters if p.device != device}

    @torch.no_grad()
    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Copy what was changed elsewhere into the model."""
        for name, value in values.items():
            parameter = block.module.get_parameter(name)
            if parameter.data_ptr() != value.data_ptr():
                parameter.copy_(value)


class Shared(Home):
    """A model in training holds the weights, each process a share; blocks are gathered whole from all of them.

    Values are those of the float32 masters where there are any. Every process makes the same blocks resident, in the
    same order, and stores the same values.
    """

    def __init__(self, live: nn.Module, dtype: torch.dtype) -> None:
        """Gather weights of ``live`` in ``dtype``."""
        super().__init__()
        self._live = live
        self._dtype = dtype

    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        """Return the whole values."""
        names = [name for name, _ in block.module.named_parameters()]
        live = self._live.get_parameter
        return {name: read_whole(live(f"{block.name}.{name}")).to(device, self._dtype) for name in names}

    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Let every process take its share."""
        for name, value in values.items():
            parameter = self._live.get_parameter(f"{block.name}.{name}")
            write_whole(parameter, value.to(parameter.device))


@contextmanager
def at_work(model: nn.Module) -> Iterator[tuple[nn.Module, Home]]:
    """Yield a model to work on, whose parameters are plain tensors, and the home of its blocks.

    That is the model itself, or a hollow copy where a strategy holds its weights elsewhere.
    """
    elsewhere = any(is_managed(parameter) for parameter in model.parameters())
    whole, home = _hollow_copy(model) if elsewhere else (model, home_of(model))
    try:
        yield whole, home
    finally:
        home.close()


def home_of(model: nn.Module) -> Home:
    """Return where the blocks of a model with plain parameters are."""
    return cast(Home, model.__dict__.get("home", None) or Memory())


def make_hollow(
    model: nn.Module,
    home: Home,
    values: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill a model whose parameters lie on the meta device: with values outside its blocks, and hollow within them.

    Args:
        model: as ``without_weights`` builds it; its ``home`` is set.
        home: of its blocks.
        values: returns those of a parameter, by its name.
        dtype: of all parameters; None = as the model has them.
        device: of all parameters; None = CPU.
    """
    within = {id(p) for part in home.parts(model) for p in part.module.parameters()}
    places = _places(model.modules())
    for name, parameter in list(model.named_parameters()):
        if id(parameter) in within:
            data = torch.full((), float("nan"), dtype=dtype or parameter.dtype, device=device).expand(parameter.shape)
        else:
            data = values(name).to(device, dtype or parameter.dtype)
        new = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for module, own in places[id(parameter)]:
            module._parameters[own] = new
    model.__dict__["home"] = home


@contextmanager
def without_weights() -> Iterator[None]:
    """Put the parameters of modules that are built in this context on the meta device; buffers get their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _hollow_copy(live: nn.Module) -> tuple[nn.Module, Home]:
    with without_weights():
        copy = plain_twin(live)
        copy_adapters(live, copy)
    first = read_whole(next(live.parameters()))
    home = Shared(live, first.dtype)
    make_hollow(copy, home, lambda name: read_whole(live.get_parameter(name)), first.dtype, first.device)
    copy_buffers(live, copy)
    return copy.train(live.training), home


def _places(modules: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules, and the names there, of every parameter; tied ones have several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    return places
