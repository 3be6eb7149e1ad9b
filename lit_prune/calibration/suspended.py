"""Forward passes of a block that wait at every layer that is still to be pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from lit_prune.errors import InputError, NumericalError
from lit_prune.models.experts import Experts

REMEDY = "set plan.sequential to false"


class SuspendedPasses:
    """Forward passes of one block, one for each batch; each of them waits at the next layer that is not pruned yet.

    So a layer's inputs come from the layers before it as they are after pruning, in a single pass through the block.
    Every pass is a coroutine of ``greenlet``, because the block's code knows nothing of being suspended; all of them
    run in the caller's thread, one at a time.
    """

    def __init__(
        self,
        run: Callable[[int], Tensor],
        batches: int,
        layers: Mapping[str, nn.Module],
        experts: Sequence[Experts],
        context: Callable[[], AbstractContextManager[Any]],
        writers: Mapping[str, nn.Module] | None = None,
        behind_writers: bool = False,
    ) -> None:
        """Prepare the passes; ``resume`` starts them.

        Args:
            run: function that returns the block's output on a batch, by index.
            batches: number of batches.
            layers: layers to wait at, by name.
            experts: mixtures of experts in the block.
            context: function that returns a context manager for the passes, such as autocast.
            writers: layers whose outputs are added to the residual stream, by name.
            behind_writers: whether to wait behind the writers, with their outputs, instead of before them.
        """
        self.waiting: list[dict[str, Tensor]] = [{} for _ in range(batches)]
        """Inputs of the layers at which a pass waits, by layer name, for each batch; empty if it has ended. Outputs of
        the writers with ``behind_writers``."""
        self._outputs: list[Tensor | None] = [None] * batches
        self.written: list[Tensor | None] = [None] * batches
        """Sum of the outputs ``[t, o]`` of the writers so far, for each batch; None before the first. The output of a
        writer that a pass waits behind is not included."""
        self._expected: list[dict[str, Tensor]] = [{} for _ in range(batches)]
        self._called: list[set[str]] = [set() for _ in range(batches)]
        self._pending = set(layers)
        self._layers = layers
        self._experts = experts
        self._run = run
        self._context = context
        self._writers = writers or {}
        self._behind = set(self._writers if behind_writers else ())
        self._passes: list[greenlet | None] = [None] * batches
        self._running: int | None = None
        self._modes: tuple[bool, ...] = ()
        self._stack = ExitStack()

    def __enter__(self) -> SuspendedPasses:
        """Watch the layers."""
        for name, module in self._layers.items():
            if name in self._behind:
                self._stack.enter_context(module.register_forward_hook(self._hook(name)))
            else:
                self._stack.enter_context(module.register_forward_pre_hook(self._hook(name)))
        for module in self._writers.values():
            self._stack.enter_context(module.register_forward_hook(self._add_written))
        for experts in self._experts:
            self._stack.enter_context(experts.announcing(self._wait_at_experts))
        return self

    def __exit__(self, *error: object) -> None:
        """Drop all passes that have not ended, and stop watching."""
        self._stack.close()
        for suspended in self._passes:
            if suspended:
                suspended.throw(GreenletExit)  # releases the activations in its frames
        self._passes.clear()
        self.waiting.clear()
        self.written.clear()

    def resume(self, pruned: Collection[str] = ()) -> None:
        """Let every pass go on to its next layer, or to its end.

        Args:
            pruned: layers to wait at no longer.
        """
        self._pending.difference_update(pruned)
        with self._context():
            self._modes = _modes()
            for batch, waits_at in enumerate(self.waiting):
                if self._outputs[batch] is None and not self._pending.intersection(waits_at):
                    self._continue(batch)

    def ended(self) -> list[Tensor]:
        """Return the block's output on each batch, after all passes have ended."""
        outputs = [output for output in self._outputs if output is not None]
        assert len(outputs) == len(self._outputs)
        return outputs

    def expect(self, batch: int, layer: str, inputs: Tensor) -> None:
        """Announce that a layer will be called with the inputs of another one, at which the pass waits."""
        self._expected[batch][layer] = inputs

    def _continue(self, batch: int) -> None:
        suspended = self._passes[batch]
        if suspended is None:
            suspended = greenlet(partial(self._run, batch))
            suspended.gr_context = copy_context()
            self._passes[batch] = suspended
        self.waiting[batch] = {}
        self._running = batch
        try:
            result = suspended.switch()
        finally:
            self._running = None
        if suspended.dead:
            self._passes[batch], self._outputs[batch] = None, result
        else:
            self.waiting[batch] = result

    def _hook(self, name: str) -> Callable[..., None]:
        """Return a hook to call in front of a layer or, with its output, behind it."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> None:
            if self._running is not None:  # another set of passes may run the same block
                self._check_call(name, args[0], self._running)
                self._wait_at({name: args[0] if output is None else output})

        return hook

    def _add_written(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._running is not None:
            rows, before = output.reshape(-1, output.shape[-1]), self.written[self._running]
            self.written[self._running] = rows if before is None else before + rows

    def _wait_at_experts(self, inputs: Mapping[nn.Module, Tensor]) -> None:
        if self._running is not None:
            names = {id(module): name for name, module in self._layers.items()}
            self._wait_at({names[id(m)]: x for m, x in inputs.items() if id(m) in names})

    def _check_call(self, name: str, inputs: Tensor, batch: int) -> None:
        if name in self._called[batch]:
            raise InputError(f"{name} is called twice in its block, so that it has no place in an order: {REMEDY}")
        self._called[batch].add(name)
        if self._expected[batch].pop(name, inputs) is not inputs:
            raise NumericalError(f"{name} shares its input with another layer in some blocks, but not here: {REMEDY}")

    def _wait_at(self, inputs: Mapping[str, Tensor]) -> None:
        """Suspend the running pass if one of these layers, which do not depend on each other, is not pruned yet."""
        unpruned = {name: value for name, value in inputs.items() if name in self._pending}
        if not unpruned:
            return
        if _modes() != self._modes:  # they belong to the thread, and so to all passes at once
            raise InputError(
                f"{next(iter(unpruned))} is called in an autocast or gradient context of its block's own, so that the "
                f"block's pass cannot be suspended: {REMEDY}"
            )
        parent = getcurrent().parent
        assert parent is not None
        parent.switch(unpruned)


def _modes() -> tuple[bool, ...]:
    """Return the state of the thread that a context manager within a block may change."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in devices))
