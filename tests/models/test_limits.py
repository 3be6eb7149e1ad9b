"""A model is not given tokens that it cannot read."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.limits import check_tokens


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox"])
def test_tokens_beyond_the_vocabulary_are_refused(model_type: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(model_type)
    check_tokens(model, torch.tensor([[0, 383]]))
    with pytest.raises(InputError, match=r"the token 384, and the model a vocabulary of 384"):
        check_tokens(model, torch.tensor([[0, 384]]))


@pytest.mark.parametrize(
    ("model_type", "learned"), [("llama", False), ("gpt_neox", False), ("gpt2", True), ("opt", True)]
)
def test_positions_beyond_the_learned_ones_are_refused(
    model_type: str, learned: bool, tiny_model: Callable[..., nn.Module]
) -> None:
    model, tokens = tiny_model(model_type), torch.zeros(1, 65, dtype=torch.int64)
    check_tokens(model, tokens[:, :64])
    if learned:
        with pytest.raises(InputError, match=r"data\.seqlen is 65, and the model has learned 64 positions"):
            check_tokens(model, tokens)
    else:
        check_tokens(model, tokens)
