"""Continuations of prompts."""

from collections.abc import Callable

import pytest
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.generate import continuations
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
