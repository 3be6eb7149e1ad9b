"""Speed of whole models on this machine: generation and prompts, two models in turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.ops.timing import seconds_of

GENERATED, PROMPT, START = 32, 512, 16
"""Numbers of tokens: generated per sequence, in a long prompt, and in the prompt of a generation."""
_TASKS = (("generation, 1 sequence", 1), ("generation, 8 sequences", 8), (f"prompt of {PROMPT} tokens", 0))
"""Names of the tasks, with the number of sequences to generate; 0 = only a prompt is read."""


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of a model and of another one on the same task."""

    task: str
    """Name of the task."""
    dense: float
    """Tokens per second of the model to compare with."""
    model: float
    """Tokens per second of the model."""
    ratio: float
    """Median over the rounds of the ratio of both; a round times both models one right after the other."""


@torch.no_grad()
def compare_speed(model: nn.Module, dense: nn.Module, rounds: int = 5) -> list[ModelSpeed]:
    """Return the speed of two causal language models on each task, in tokens per second.

    Every round times one model and then the other, so that what else the machine does affects both.

    Args:
        model: model in evaluation mode.
        dense: model to compare with, on the same device and in evaluation mode.
        rounds: number of rounds, after one that is not counted.
    """
    found = []
    for task, sequences in _TASKS:
        works = {name: _work(each, sequences) for name, each in (("dense", dense), ("model", model))}
        tokens = _tokens(sequences)
        seconds = _in_turn(works, rounds)
        rates = {name: tokens / median(times) for name, times in seconds.items()}
        ratios = [before / now for before, now in zip(seconds["dense"], seconds["model"], strict=True)]
        found.append(ModelSpeed(task, rates["dense"], rates["model"], median(ratios)))
    return found


@torch.no_grad()
def tokens_per_second(model: nn.Module, sequences: int, rounds: int = 5) -> float:
    """Return the median speed of a model, in tokens per second.

    Args:
        model: model in evaluation mode.
        sequences: number of sequences to generate; 0 = a long prompt is read.
        rounds: number of rounds, after one that is not counted.
    """
    return _tokens(sequences) / median(_in_turn({"model": _work(model, sequences)}, rounds)["model"])


def _tokens(sequences: int) -> int:
    return sequences * GENERATED or PROMPT


def _work(model: Any, sequences: int) -> Callable[[], object]:
    """Return a function that generates for a number of sequences, or reads a prompt if it is 0."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    prompt: Tensor = torch.arange(START if sequences else PROMPT, device=device).remainder(vocabulary)[None]
    if not sequences:
        return lambda: model(input_ids=prompt, logits_to_keep=1)
    return lambda: _generate(model, prompt.expand(sequences, -1))


def _generate(model: Any, prompt: Tensor) -> None:
    """Generate token by token, greedily, with the keys and values of earlier tokens cached."""
    ids, cache = prompt, None
    for _ in range(GENERATED):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values


def _in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each piece of work in each round, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            taken = seconds_of(work)
            if turn:
                seconds[name].append(taken)
    return seconds


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of a model's weights in bytes, whether they are parameters or packed in buffers."""
    weights = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return sum(weights.values())
