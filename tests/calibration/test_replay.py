from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.calibration.replay import BlockReplay, evaluation_mode
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import find_targets
from support.rounding import network

GRAM = frozenset({"gram"})


def layers_of(model: nn.Module, block: int) -> dict[str, nn.Module]:
    return {t.name: t.module for t in find_targets(model, find_blocks(model)) if t.block == block}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "opt", "gpt2", "gpt_neox"])
def test_replay_sees_what_the_whole_model_sees(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    # The reference: hooks on the whole model's own forward pass. Sixteen tokens exceed Gemma's window of eight, so a
    # block replayed with another block's attention mask would differ.
    model = tiny_model(model_type)
    expected: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            expected[name] = expected.get(name, 0) + rows.T @ rows

        return add

    blocks = find_blocks(model)
    targets = find_targets(model, blocks)
    handles = [t.module.register_forward_pre_hook(hook(t.name)) for t in targets]
    with torch.no_grad():
        for batch in tokens:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    replay = BlockReplay(model, blocks, tokens)
    for block in blocks:
        stats = replay.collect(block.index, layers_of(model, block.index), GRAM)
        for name, layer_stats in stats.items():
            gram, norms = expected.pop(name), layer_stats.gram.diagonal().sqrt()
            # Products of two activations, each with the rounding of the way to it, as of the inputs' norms (Cauchy).
            assert bool(((layer_stats.gram - gram).abs() <= 2 * network(model) * torch.outer(norms, norms)).all()), name
            assert (layer_stats.sequences, layer_stats.tokens) == (6, 96)
        replay.advance(block.index)
    assert not expected


@pytest.mark.parametrize("advance", [False, True])
def test_a_pass_that_nobody_needs_the_output_of_ends_with_the_last_layer(
    advance: bool, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    finished: list[int] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: finished.append(1))
    batches = [*tokens, *tokens]
    replay, twin = (BlockReplay(model, find_blocks(model), batches) for _ in range(2))
    finished.clear()
    stats = replay.collect(0, layers_of(model, 0), GRAM, advance=advance)
    assert len(finished) == (4 if advance else 1)  # the first batch tells which layer is the last
    assert all(value.tokens == 2 * 96 for value in stats.values())
    if not advance:
        replay.advance(0)
    twin.advance(0)
    assert all(torch.equal(a, b) for a, b in zip(replay.hidden, twin.hidden, strict=True))


def test_layers_with_the_same_input_share_their_statistics(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    stats = BlockReplay(model, find_blocks(model), tokens).collect(0, layers_of(model, 0), GRAM)
    by_kind = {name.rsplit(".", 1)[-1]: value for name, value in stats.items()}
    assert by_kind["q_proj"] is by_kind["k_proj"] is by_kind["v_proj"]
    assert by_kind["gate_proj"] is by_kind["up_proj"]
    assert len({id(value) for value in stats.values()}) == 4


def test_equal_masks_are_held_once(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model("gemma3_text")
    replay = BlockReplay(model, find_blocks(model), tokens)
    for calls in replay._calls:
        first, second = (call.kwargs["position_embeddings"] for call in calls)
        assert first[0] is second[0]


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = [block.module.forward for block in find_blocks(model)]
    with evaluation_mode(model):
        replay = BlockReplay(model, find_blocks(model), tokens)
        replay.collect(0, layers_of(model, 0), GRAM)
    assert model.training and all(module.training for module in model.modules())
    assert [block.module.forward for block in find_blocks(model)] == forwards
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_keyword_batches_work_and_padded_ones_are_refused(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    batch = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0])}
    BlockReplay(model, find_blocks(model), [batch]).advance(0)
    batch["attention_mask"][0, -1] = 0
    with pytest.raises(InputError, match="padded"):
        BlockReplay(model, find_blocks(model), [batch])


def test_no_batches_are_refused(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="no calibration batches"):
        BlockReplay(model, find_blocks(model), [])


def test_nan_activations_name_block_and_batch(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    replay = BlockReplay(model, find_blocks(model), tokens)
    replay.advance(0)
    with pytest.raises(NumericalError, match=r"output of model\.layers\.1 holds NaN or Inf on calibration batch 0"):
        replay.advance(1)


def test_the_output_error_is_relative_by_token(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    replay = BlockReplay(model, find_blocks(model), tokens)
    outputs = replay.outputs(0)
    assert replay.output_error(0, outputs) == 0.0
    # Outputs that were 1, 2 and 4 times as large, by token, have changed by 0, 1/2 and 3/4 of themselves.
    factors = torch.tensor([1.0, 2.0, 4.0, 4.0] * 4).reshape(16, 1)
    error = replay.output_error(0, [output * factors for output in outputs])
    assert error == pytest.approx((0 + 0.25 + 0.5625 + 0.5625) / 4)


def test_known_outputs_advance_like_those_it_works_out(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    known, afresh = (BlockReplay(model, find_blocks(model), tokens) for _ in range(2))
    known.advance(0, known.outputs(0))
    afresh.advance(0)
    assert all(torch.equal(a, b) for a, b in zip(known.outputs(1), afresh.outputs(1), strict=True))


def test_a_layer_that_is_never_called_is_named(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    replay = BlockReplay(model, find_blocks(model), tokens)
    with pytest.raises(InputError, match="spare was never called"):
        replay.collect(0, {"spare": nn.Linear(2, 2)}, GRAM)


def test_autocast_statistics_are_float32(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    replay = BlockReplay(
        model, find_blocks(model), tokens, forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    stats = replay.collect(0, layers_of(model, 0), GRAM)
    assert all(value.gram.dtype == torch.float32 for value in stats.values())
    exact = BlockReplay(model, find_blocks(model), tokens).collect(0, layers_of(model, 0), GRAM)
    for name, value in stats.items():
        assert (value.gram - exact[name].gram).norm() < 0.02 * exact[name].gram.norm()
