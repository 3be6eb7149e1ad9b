"""Limits on the tokens and sequence lengths that a model supports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_prune.errors import InputError


def check_tokens(model: Any, input_ids: Tensor) -> None:
    """Raise ``InputError`` if a model has no embedding for a token, or no learned embedding for its position.

    Args:
        model: a causal language model of transformers; its weights may be sharded.
        input_ids: ``[sequences, t]`` (int64), preferably in CPU memory.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = int(input_ids.max())
    if highest >= vocabulary:
        raise InputError(
            f"the text has the token {highest}, and the model a vocabulary of {vocabulary}: set --data.tokenizer to "
            "that of the model"
        )
    positions = _learned_positions(model)
    if positions is not None and input_ids.shape[-1] > positions:
        raise InputError(
            f"data.seqlen is {input_ids.shape[-1]}, and the model has learned {positions} positions: lower it"
        )


def _learned_positions(model: Any) -> int | None:
    """Return the maximum length of a sequence; None if positions are computed, so that any length is possible."""
    embeddings = {module for module in model.modules() if isinstance(module, nn.Embedding)}
    others = embeddings - {model.get_input_embeddings()}
    return getattr(model.config, "max_position_embeddings", None) if others else None
