"""Training losses: cross-entropy of the text, or distillation from a teacher."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedTokenizerBase

from lit_prune.checkpoint.outputs import check_folder_for
from lit_prune.errors import InputError
from lit_prune.training.strategies import Sharding
from lit_prune.training.teacher import Teacher, TeacherDtype, Truth

_LOWEST = 1e-3
"""Lowest temperature; the highest one is its inverse."""
IGNORED = -100
"""Target of a position that the loss ignores."""
_LEAST_REST = 1e-6
"""Minimum probability of the outcomes outside ``top_k``, the accuracy of a sum of probabilities in float32."""


@dataclass(frozen=True)
class Student:
    """Description of the model in training, passed to a loss before the first step."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sharding: Sharding | None = None
    """Function that shards another model in the same way as the student; None if the student is not sharded."""


class Loss(ABC):
    """Base class of training losses."""

    def prepare(self, student: Student) -> None:
        """Prepare for training before the first step; raise ``InputError`` if the student is incompatible."""
        return

    @abstractmethod
    def __call__(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the ``loss`` of ``input_ids`` ``[sequences, t]`` and its terms, by name, as float32 scalars."""


@final
class LanguageModelLoss(Loss):
    """Mean next-token cross-entropy, in nats.

    .. code-block:: yaml

        model: {loss: {class_path: LanguageModelLoss}}
    """

    def __call__(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the ``loss`` of ``input_ids`` ``[sequences, t]``."""
        return {"loss": next_token_loss(model(input_ids=input_ids, use_cache=False).logits, input_ids)}


@final
class Distillation(Loss):
    """Distillation from the dense model: ``language_model · CE + logits · T² KL + hidden · SquareHead``.

    KL (Hinton et al., 2015) is KL(teacher || student) of the next-token distributions, both at temperature T, in nats,
    averaged over all positions. SquareHead (Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large
    Language Models", 2023) is ``MSE(student, teacher) / MSE(teacher, 0)`` of the hidden states after each block,
    averaged over blocks (the last one after the final norm, as transformers returns it).

    With ``top_k``, KL is computed over the teacher's k likeliest tokens and one outcome for all other tokens: it is
    never above the full KL, and zero if the student agrees on all of these outcomes.

    The teacher is frozen, in evaluation mode, in its own precision, and not saved in checkpoints. FSDP2 and ZeRO-3
    shard it like the student; under the other strategies each process holds all of its weights.

    .. code-block:: yaml

        model:
          loss:
            class_path: Distillation
            init_args: {teacher: HuggingFaceTB/SmolLM2-135M, logits: 1.0, hidden: 1.0, language_model: 0.5}
    """

    def __init__(
        self,
        teacher: str,
        language_model: float = 0.5,
        logits: float = 1.0,
        hidden: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        dtype: TeacherDtype = "bfloat16",
        cache: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Validate and store the arguments; the teacher is loaded when training starts.

        Args:
            teacher: Hub name, local Hugging Face folder or GGUF file of the dense model.
            language_model: Weight of the cross-entropy of the text.
            logits: Weight of the KL divergence.
            hidden: Weight of the hidden-state loss.
            temperature: Temperature of both distributions; higher is softer.
            top_k: Number of likeliest tokens of the teacher to compare individually; null = the whole vocabulary.
            dtype: Dtype of the teacher's weights.
            cache: Folder that caches the teacher's ``top_k`` outputs for later epochs and runs, at about ``6 top_k``
                bytes per token; null = no cache.
            trust_remote_code: Run code that comes with the teacher.
        """
        for name, weight in (("language_model", language_model), ("logits", logits), ("hidden", hidden)):
            if not 0 <= weight < math.inf:
                raise InputError(f"Distillation.{name} is {weight}: it must be a number of 0 or more")
        if not logits and not hidden:
            raise InputError("Distillation.logits and hidden are both 0: use LanguageModelLoss, or raise one of them")
        if not _LOWEST <= temperature <= 1 / _LOWEST:
            raise InputError(f"Distillation.temperature is {temperature}: it must be from {_LOWEST} to {1 / _LOWEST:g}")
        if top_k is not None and top_k < 1:
            raise InputError(f"Distillation.top_k is {top_k}: it must be at least 1, such as 64")
        if cache is not None:
            check_folder_for("Distillation.cache", cache)
        if cache is not None and (top_k is None or hidden):
            raise InputError("Distillation.cache keeps the teacher's top_k alone: set top_k, and hidden to 0")
        self.weights = {"language_model": language_model, "logits": logits, "hidden": hidden}
        self.temperature = temperature
        # Teacher is not an nn.Module, so that no optimizer, checkpoint or strategy includes its weights.
        self.teacher = Teacher(teacher, dtype, temperature, top_k, bool(hidden), cache, trust_remote_code)

    def prepare(self, student: Student) -> None:
        """Load the teacher; raise ``InputError`` if its vocabulary differs from the student's."""
        self.teacher.load_for(student.model, student.tokenizer, student.sharding)

    def __call__(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the ``loss`` and its terms ``language_model``, ``logits`` and ``hidden``, if their weight is not 0."""
        truth = self.teacher(input_ids)
        output = model(input_ids=input_ids, use_cache=False, output_hidden_states=bool(self.weights["hidden"]))
        parts = {}
        if self.weights["language_model"]:
            parts["language_model"] = next_token_loss(output.logits, input_ids)
        if self.weights["logits"]:
            parts["logits"] = self.temperature**2 * kl_divergence(output.logits, truth, self.temperature)
        if self.weights["hidden"]:
            parts["hidden"] = square_head(output.hidden_states[1:], truth.hidden)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy (float32, nats) of every token except the first, given the tokens before it."""
    # The last position has no next token; ignoring its target avoids copying the logits without it.
    targets = pad(input_ids[:, 1:], (0, 1), value=IGNORED)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def kl_divergence(logits: Tensor, truth: Truth, temperature: float) -> Tensor:
    """Return KL(teacher || student) in nats, averaged over positions.

    Args:
        logits: logits of the student, ``[sequences, t, vocabulary]``.
        truth: outputs of the teacher, with log-probabilities at the same temperature.
        temperature: temperature of the student's distribution.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = truth.log_probabilities.float()
    if truth.tokens is None:
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    student = student.gather(-1, truth.tokens)
    known = (teacher.exp() * (teacher - student)).sum(-1)
    rest_of_teacher, rest_of_student = (
        (1 - log_probabilities.exp().sum(-1)).clamp(min=_LEAST_REST) for log_probabilities in (teacher, student)
    )
    return (known + rest_of_teacher * (rest_of_teacher.log() - rest_of_student.log())).mean()


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return ``MSE(student, teacher) / MSE(teacher, 0)``, averaged over blocks, of hidden states ``[n, t, d]``."""
    ratios = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(ratios).mean()
