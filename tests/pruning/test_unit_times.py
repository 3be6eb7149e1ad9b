"""Times of units, by a clock that counts weights in place of seconds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocators import Measured
from lit_prune.calibration.dependencies import find_couplings
from lit_prune.calibration.replay import BlockReplay
from lit_prune.models.blocks import find_blocks
from lit_prune.ops import Structured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.pruning.unit_times import GENERATED, UnitTimes, first_token
from lit_prune.scorers import Magnitude
from lit_prune.sharding.block_store import store_of

HEAD, CHANNEL = 32 * (16 + 8 + 8 + 16), 3 * 32
"""Weights of a unit of the tiny llama, whose blocks have 2 key-value heads and 48 channels."""


class Clock:
    """Times a block by its weights; those of the attention count ``attention`` times, and single tokens a tenth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attention: float = 1.0) -> None:
        self.attention, self.timed = attention, 0
        monkeypatch.setattr("lit_prune.pruning.unit_times._timed", self)

    def __call__(self, replay: BlockReplay, index: int) -> float:
        self.timed += 1
        replay.run(index, 0)  # so that a module that does not run is noticed
        module = replay._blocks[index].module
        weights = {name: p.numel() for name, p in module.named_parameters() if p.dim() == 2}
        seconds = sum(n * (self.attention if "attn" in name else 1) for name, n in weights.items())
        return seconds if replay.hidden[0].shape[1] > 1 else seconds / 10


@torch.no_grad()
def test_units_take_the_time_that_the_block_is_slower_with_them(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, model = Clock(monkeypatch), tiny_model().eval()
    blocks = find_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    times = UnitTimes(*(BlockReplay(model, blocks, [batch]) for batch in (tokens[0], first_token(tokens[0]))))
    requests = 1 + GENERATED / 10  # a prompt, and single tokens
    found = find_couplings(model, blocks, store_of(model))
    for kind, units, size in (("heads", 2, HEAD), ("channels", 48, CHANNEL)):
        mine = [[c for c in found if c.kind == kind and c.consumer.block == block.index] for block in blocks]
        seconds = times.of_units(blocks[0], mine[0])
        assert seconds == pytest.approx(requests * units * size)
        count = clock.timed
        assert (
            times.of_units(blocks[1], mine[1]) == seconds and clock.timed == count
        )  # an equal block is not timed again
    assert times.of_block(blocks[2]) == pytest.approx(requests * (2 * HEAD + 48 * CHANNEL))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(block.module is now.module for block, now in zip(blocks, find_blocks(model), strict=True))


def test_the_first_token_of_a_batch_with_arguments() -> None:
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3)}
    assert first_token(batch)["input_ids"].tolist() == [[0], [3]]  # type: ignore[call-overload, index]
    assert first_token(batch)["attention_mask"].shape == (2, 1)  # type: ignore[call-overload, index]


@pytest.mark.parametrize(("attention", "heads"), [(100.0, True), (0.01, False)])
def test_what_takes_the_time_goes(
    attention: float,
    heads: bool,
    tiny_model: Callable[..., nn.Module],
    tokens: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch, attention)
    pattern, allocator = Structured(0.15, ["channels", "heads"]), Measured(budget="time")
    report = prune(tiny_model(), tokens, PruningPlan(pattern, Magnitude(), allocator, output_error=False))
    gone = {"o_proj": 0, "down_proj": 0}
    for layer in report.layers:
        if layer.kept_columns is not None:
            gone[layer.name.rpartition(".")[2]] += layer.shape[1] - len(layer.kept_columns)
    removed = {"heads": gone["o_proj"] / 16, "channels": float(gone["down_proj"])}
    assert bool(removed["heads"]) == heads
    # 15 % of the time of all units of three blocks, to half of a channel.
    cost = {"heads": HEAD * attention, "channels": CHANNEL}
    total = 3 * (2 * cost["heads"] + 48 * cost["channels"])
    assert abs(sum(removed[kind] * cost[kind] for kind in cost) - 0.15 * total) <= max(cost.values()) / 2


def test_a_block_without_units_in_time_is_an_error(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_prune.pruning.unit_times._timed", lambda replay, index: 1.0)
    plan = PruningPlan(Structured(0.3), Magnitude(), Measured(budget="time"), output_error=False)
    with pytest.raises(Exception, match="units take no time that can be measured here"):
        prune(tiny_model(), tokens, plan)
