"""Continuations of prompts, and sampled text."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError, NumericalError
from lit_prune.models.generate import continuations, sample_sequences
from lit_prune.models.tokenizer import load_tokenizer


def test_a_continuation_is_greedy_and_leaves_the_mode(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model().train()
    first, again = (continuations(model, load_tokenizer("random"), ["Once upon"], tokens=5) for _ in range(2))
    assert first == again and len(first) == 1 and model.training


def test_a_bad_generation_config_is_one_line(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    model.generation_config.num_beams = -1
    with pytest.raises(InputError, match=r"cannot continue 'Once' .* correct its generation_config\.json, or leave"):
        continuations(model, load_tokenizer("random"), ["Once"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_samples_are_those_of_the_whole_model(model_type: str, tiny_model: Callable[..., nn.Module]) -> None:
    """The cache of keys and values changes nothing: drawn again from whole passes, the tokens are the same."""
    model = tiny_model(model_type).double()
    got = sample_sequences(model, [], sequences=3, seqlen=7, seed=5)
    torch.manual_seed(5)
    expected = torch.arange(model.config.vocab_size)[torch.randint(model.config.vocab_size, (3, 1))]
    with torch.no_grad():
        for _ in range(6):
            likely = model(expected, use_cache=False).logits[:, -1].float().softmax(-1)
            expected = torch.cat([expected, torch.multinomial(likely, 1)], 1)
    assert torch.equal(got, expected) and got.dtype == torch.int64


def test_samples_follow_the_seed_and_leave_the_global_generator(tiny_model: Callable[..., nn.Module]) -> None:
    model, state = tiny_model(), torch.get_rng_state()
    special = range(5, model.config.vocab_size)
    one, again, other = (sample_sequences(model, special, 20, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (20, 4) and set(one[:, 0].tolist()) == set(range(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_computes_nan_writes_nothing(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.get_parameter("model.norm.weight"), float("nan"))
    with pytest.raises(NumericalError, match="cannot write text to calibrate on"):
        sample_sequences(model, [], 1, 3, 0)


def test_sequences_longer_than_the_models_positions_are_refused(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(InputError, match="position"):
        sample_sequences(model, [], 1, model.config.n_positions + 1, 0)
