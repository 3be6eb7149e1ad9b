"""Which inputs of a block's layers depend on which outputs of other layers, traced with NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_prune.calibration.block_inputs import Recorder
from lit_prune.errors import InputError, first_line
from lit_prune.models.blocks import Block
from lit_prune.models.coupling import Coupling, Reach, couple
from lit_prune.models.experts import Expert, Experts
from lit_prune.models.targets import Target, find_targets
from lit_prune.sharding.block_store import BlockStore
from lit_prune.sharding.parameters import read_weight

_ROWS_AT_ONCE = 2048
"""Maximum number of outputs that are traced in one pass, each by a sequence of a single token."""


@torch.no_grad()
def find_couplings(model: nn.Module, blocks: Sequence[Block], store: BlockStore) -> list[Coupling]:
    """Return the coupled units of all blocks of a model, which is in evaluation mode.

    They are found from the code of the model as it runs, not from names: one output of a layer at a time becomes NaN,
    and the inputs of other layers that become NaN depend on it. While they are traced, linear layers return constants,
    so that this takes little time. Blocks with the same layers are traced once.
    """
    targets: dict[int, dict[str, Target]] = {block.index: {} for block in blocks}
    for target in find_targets(model, blocks):
        targets[target.block][target.name] = target
    known: dict[object, dict[str, Reach]] = {}
    found = []
    for block in blocks:
        mine = {name.removeprefix(f"{block.name}."): target for name, target in targets[block.index].items()}
        kind = type(block.module), tuple((name, target.shape) for name, target in mine.items())
        if kind not in known:
            known[kind] = _reach_of(model, blocks, block, mine, store)
        found += couple(known[kind], mine)
    return found


def _reach_of(
    model: nn.Module, blocks: Sequence[Block], block: Block, targets: Mapping[str, Target], store: BlockStore
) -> dict[str, Reach]:
    experts = {name: module for name, module in block.module.named_modules() if isinstance(module, Expert)}
    outside = {name: t for name, t in targets.items() if not any(name.startswith(f"{e}.") for e in experts)}
    tokens = _most_rows(outside)
    ids = torch.zeros(tokens, 1, dtype=torch.int64, device=next(model.parameters()).device)
    hidden, calls = Recorder(model, blocks, store).record({"input_ids": ids})
    hidden, call = torch.ones_like(hidden), calls[block.index]

    def run() -> Tensor:
        try:
            output = block.module(hidden, *call.args, **call.kwargs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the units of {block.name} cannot be found, because it does not run on single tokens "
                f"({first_line(error)}): use an unstructured or N:M pattern"
            ) from error
        return output[0] if isinstance(output, tuple) else output

    with store.resident(block):
        with _experts_skipped(block.module):
            reach = _traced(run, outside, tokens)
        for name, expert in experts.items():
            inside = {each: target for each, target in targets.items() if each.startswith(f"{name}.")}
            reach |= _traced_expert(expert, inside)
    return reach


def _most_rows(layers: Mapping[str, Target]) -> int:
    return min(_ROWS_AT_ONCE, max(target.shape[0] for target in layers.values()))


def _traced_expert(expert: Expert, layers: Mapping[str, Target]) -> dict[str, Reach]:
    tokens = _most_rows(layers)
    inputs = next(expert.parameters()).new_ones(tokens, next(iter(layers.values())).shape[1])
    return _traced(lambda: expert.down(expert.inner(inputs)), layers, tokens)


def _traced(run: Callable[[], Tensor], layers: Mapping[str, Target], tokens: int) -> dict[str, Reach]:
    """Return which inputs each of the layers reaches.

    Args:
        run: function that runs the layers, and returns their last output.
        layers: layers by name.
        tokens: number of tokens on which ``run`` runs them, each a sequence of its own.
    """
    reach: dict[str, Reach] = {name: {} for name in layers}
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        probes = {name: stack.enter_context(_probing(target.module)) for name, target in layers.items()}
        for name, target in layers.items():
            pairs: dict[str, list[Tensor]] = {}
            for first in range(0, target.shape[0], tokens):
                for probe in probes.values():
                    probe.reset()
                probes[name].first = first
                ends = run()
                for other, values in [("", ends), *((each, probe.inputs) for each, probe in probes.items())]:
                    if values is None or not (spoilt := values.reshape(-1, values.shape[-1]).isnan()).any():
                        continue
                    if len(spoilt) != tokens:
                        raise InputError(
                            f"{other or 'the output'} of {name} has {len(spoilt)} rows for {tokens} tokens, so that "
                            "its units cannot be traced: exclude it with plan.exclude, or use an unstructured pattern"
                        )
                    token, place = spoilt.nonzero(as_tuple=True)
                    pairs.setdefault(other, []).append(torch.stack([token + first, place]).cpu())
            reach[name] = {other: torch.cat(parts, 1) for other, parts in pairs.items()}
    return reach


class _Probe:
    """Stands in for a linear layer: returns ones, and notes where its inputs are NaN."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        self.reset()

    def reset(self) -> None:
        """Forget the inputs; put no NaN into the outputs."""
        self.first: int | None = None
        """Output of the first token that becomes NaN, of the second the next one, and so on; None = none."""
        self.inputs: Tensor | None = None

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.inputs = inputs if self.inputs is None else self.inputs + inputs
        outputs = inputs.new_ones(*inputs.shape[:-1], self._outputs)
        if self.first is not None:
            rows = outputs.reshape(-1, self._outputs)
            token = torch.arange(min(len(rows), self._outputs - self.first), device=inputs.device)
            rows[token, token + self.first] = float("nan")
            outputs = rows.reshape(outputs.shape)
        return outputs


@contextmanager
def _probing(module: nn.Module) -> Iterator[_Probe]:
    probe: Any = _Probe(read_weight(module).shape[0])
    module.forward = probe
    try:
        yield probe
    finally:
        del module.forward


@contextmanager
def _experts_skipped(block: nn.Module) -> Iterator[None]:
    """Let mixtures of experts return their inputs, so that NaN reaches the block's output."""
    found = [module for module in block.modules() if isinstance(module, Experts)]
    for module in found:
        module.forward = lambda hidden, *rest: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in found:
            del module.forward
