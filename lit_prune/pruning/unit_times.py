"""Seconds that the units of a block take on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lit_prune.calibration.batches import Batch
from lit_prune.calibration.replay import BlockReplay
from lit_prune.models.blocks import Block
from lit_prune.models.coupling import Coupling
from lit_prune.ops import collectives
from lit_prune.ops.timing import seconds_of
from lit_prune.pruning.units import narrower
from lit_prune.sharding.parameters import PRUNABLE, read_weight

GENERATED = 32
"""Number of single tokens that are timed beside a prompt, as in a request for a text of this length."""
_ROUNDS = 9
"""Number of times that a block is timed, after one that is not counted; the fastest counts."""


@dataclass(frozen=True)
class UnitTimes:
    """Times blocks, and how much faster they are with half of their units, once for each class and shape of blocks.

    A time is that of a prompt and ``GENERATED`` single tokens, without keys and values of earlier tokens.
    """

    prompt: BlockReplay
    """Replay of one sequence, with the whole sequence on every process."""
    token: BlockReplay
    """Replay of the first token of that sequence."""
    _known: dict[object, float] = field(default_factory=dict)

    def of_block(self, block: Block) -> float:
        """Return the seconds of a block; it is resident in memory."""
        return self._once(("block", _kind(block)), lambda: self._seconds(block, [block.module])[0])

    def of_units(self, block: Block, couplings: Sequence[Coupling]) -> float:
        """Return the seconds that all units of some couplings take: twice those that the block gains without half.

        Args:
            block: a block that is resident in memory.
            couplings: its couplings of one kind.
        """
        return self._once((couplings[0].kind, _kind(block)), lambda: self._difference(block, couplings))

    def _once(self, key: object, measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = collectives.on_first_rank(measure)
        return self._known[key]

    def _difference(self, block: Block, couplings: Sequence[Coupling]) -> float:
        fewer, part = narrower(block, couplings)
        before, after = self._seconds(block, [block.module, fewer])
        return (before - after) / part

    def _seconds(self, block: Block, modules: Sequence[nn.Module]) -> list[float]:
        """Return the seconds of modules in place of a block, in turn."""
        total = [0.0] * len(modules)
        for replay, times in ((self.prompt, 1), (self.token, GENERATED)):
            replays = [replay.replaced(block.index, module) for module in modules]
            rounds = [[_timed(each, block.index) for each in replays] for _ in range(_ROUNDS + 1)]
            fastest = [min(found) for found in zip(*rounds[1:], strict=True)]
            total = [sum_ + times * seconds for sum_, seconds in zip(total, fastest, strict=True)]
        return total


def first_token(batch: Batch) -> Batch:
    """Return the first token of every sequence of a batch."""
    if isinstance(batch, Tensor):
        return batch[:, :1]
    return {name: value[:, :1] if value.dim() == 2 else value for name, value in batch.items()}


def _kind(block: Block) -> object:
    layers = {name: module for name, module in block.module.named_modules() if isinstance(module, PRUNABLE)}
    return type(block.module), tuple((name, read_weight(module).shape) for name, module in layers.items())


def _timed(replay: BlockReplay, index: int) -> float:
    return seconds_of(lambda: replay.run(index, 0))
