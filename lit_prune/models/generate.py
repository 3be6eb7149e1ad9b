"""Text generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import InputError, first_line


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int = 40
) -> list[str]:
    """Return the greedy continuation of each prompt.

    Args:
        model: a causal language model; its mode is restored.
        tokenizer: tokenizer of the model.
        prompts: prompts to continue.
        tokens: maximum number of new tokens.
    """
    training = model.training
    model.eval()
    generator: Any = model
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(generator.device)
        try:
            written = generator.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        except (TypeError, ValueError, RuntimeError) as error:  # of values in generation_config.json
            raise InputError(
                f"prompts: the model cannot continue {prompt!r:.80} ({first_line(error)}); correct its "
                "generation_config.json, or leave samples out with --prompts '[]'"
            ) from error
        found.append(str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    model.train(training)
    return found
