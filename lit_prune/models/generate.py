"""Text generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import InputError, NumericalError, first_line
from lit_prune.models.limits import check_tokens

_AT_ONCE = 16
"""Number of sequences to sample at once: each keeps the keys and values of all its tokens."""


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


@torch.no_grad()
def sample_sequences(model: nn.Module, special: Collection[int], sequences: int, seqlen: int, seed: int) -> Tensor:
    """Return text sampled from a model at temperature 1, as token ids ``[sequences, seqlen]`` (int64) on the CPU.

    The first token of a sequence is drawn uniformly from the vocabulary, so that the texts differ in their subjects.

    Args:
        model: a causal language model in evaluation mode.
        special: ids of tokens that no sequence begins with, such as those that mark its end.
        sequences: number of sequences.
        seqlen: tokens per sequence; at least 2.
        seed: seed of the sample; the state of the global generators is restored.

    Raises:
        InputError: if the sequences are longer than the model can process.
        NumericalError: if logits are NaN or infinite.
    """
    generator: Any = model
    words = torch.tensor(sorted(set(range(generator.config.vocab_size)).difference(special)))
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, sequences, _AT_ONCE):
            first = words[torch.randint(len(words), (min(_AT_ONCE, sequences - start), 1))]
            check_tokens(model, first.expand(-1, seqlen))
            found.append(_continue(generator, first.to(generator.device), seqlen - 1).cpu())
    return torch.cat(found)


def _continue(model: Any, tokens: Tensor, steps: int) -> Tensor:
    """Return token ids ``[sequences, t]`` with ``steps`` more, sampled without the model's generation config."""
    found, cache = [tokens], None
    for _ in range(steps):
        output = model(input_ids=found[-1], past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        if not logits.isfinite().all():
            raise NumericalError("the model's logits hold NaN or Inf, so that it cannot write text to calibrate on")
        found.append(torch.multinomial(logits.softmax(-1), 1))
    return torch.cat(found, 1)
