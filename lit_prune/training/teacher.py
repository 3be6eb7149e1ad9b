"""Teacher for distillation: the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_prune.checkpoint.files import load_tensors, save_tensors
from lit_prune.checkpoint.fingerprints import data_fingerprint, model_fingerprint
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.locate import asked_as
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training.strategies import Sharding

TeacherDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Truth:
    """Outputs of the teacher for ``[sequences, t]`` tokens."""

    log_probabilities: Tensor
    """Log-probabilities at the teacher's temperature: ``[sequences, t, vocabulary]``, or only the k likeliest,
    ``[sequences, t, k]``."""
    tokens: Tensor | None
    """Ids of the k likeliest tokens, ``[sequences, t, k]`` (int64); None = the whole vocabulary in order."""
    hidden: Sequence[Tensor] = ()
    """Hidden states after each block, ``[sequences, t, d]``; empty unless the loss needs them."""


class Teacher:
    """A frozen model outside the module tree, with a cache of its outputs."""

    def __init__(
        self,
        pretrained: str,
        dtype: TeacherDtype,
        temperature: float,
        top_k: int | None,
        hidden: bool,
        cache: str | None,
        trust_remote_code: bool,
    ) -> None:
        """Store the arguments, which are those of ``Distillation``."""
        self.pretrained = pretrained
        self.dtype = getattr(torch, dtype)
        self.temperature = temperature
        self.top_k = top_k
        self.hidden = hidden
        self.cache = Path(cache).expanduser() if cache else None
        self.trust_remote_code = trust_remote_code
        self.model: Any = None
        """Dense model; None until it is needed."""
        self._key = ""
        self._sharded = False

    def load_for(self, student: nn.Module, tokenizer: PreTrainedTokenizerBase, sharding: Sharding | None) -> None:
        """Load the teacher of a student, and shard it like the student unless it has a cache.

        Raises:
            InputError: if teacher and student do not share their vocabulary, or hidden states cannot be compared.
        """
        self.model = self._load()
        self._check(student, tokenizer)
        if self.cache is not None:
            # Processes find different windows in the cache, so they cannot run the collectives of a sharded teacher
            # together.
            self._key = f"{model_fingerprint(self.model)}-top{self.top_k}-at{self.temperature:g}"
            self.model = None  # reloaded only if a window is not in the cache
        elif sharding is not None:
            self.model = sharding(self.model)
            self._sharded = True

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Truth:
        """Return the outputs of the teacher, or of its cache, for ``input_ids`` ``[sequences, t]``."""
        if self.cache is None:
            return self._run(input_ids)
        files = [self.cache / self._key / f"{data_fingerprint([window])}.safetensors" for window in input_ids]
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        if missing:
            said = self._run(input_ids[missing])
            assert said.tokens is not None
            for row, index in enumerate(missing):
                window = {"log_probabilities": said.log_probabilities[row].half(), "tokens": said.tokens[row].int()}
                save_tensors(files[index], window)
        windows = [load_tensors(file) for file in files]
        log_probabilities, tokens = (
            torch.stack([window[name] for window in windows]).to(input_ids.device)
            for name in ("log_probabilities", "tokens")
        )
        return Truth(log_probabilities, tokens.long())

    def _load(self) -> Any:
        with asked_as("Distillation.teacher"):
            return load_model(self.pretrained, self.dtype, None, self.trust_remote_code).requires_grad_(False)

    def _run(self, input_ids: Tensor) -> Truth:
        if self.model is None:
            self.model = self._load()
        if not self._sharded and self.model.device != input_ids.device:
            self.model.to(input_ids.device)
        # Autocast is for the student; the teacher runs in the dtype of its weights.
        with torch.autocast(input_ids.device.type, enabled=False):
            output = self.model(input_ids=input_ids, use_cache=False, output_hidden_states=self.hidden)
        log_probabilities, tokens = (output.logits.float() / self.temperature).log_softmax(-1), None
        if self.top_k is not None:
            log_probabilities, tokens = log_probabilities.topk(self.top_k)
        return Truth(log_probabilities, tokens, output.hidden_states[1:] if self.hidden else ())

    def _check(self, student: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        ours, theirs = student.config, self.model.config
        who = f"Distillation.teacher is {self.pretrained!r}"
        if ours.vocab_size != theirs.vocab_size:
            raise InputError(
                f"{who}: its vocabulary has {theirs.vocab_size} tokens and the student's {ours.vocab_size}; name the "
                "dense model that the student was pruned from"
            )
        if load_tokenizer(self.pretrained, self.trust_remote_code).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{who}: its tokenizer is not the student's, so token numbers mean other text; name the dense model "
                "that the student was pruned from"
            )
        if self.top_k is not None and self.top_k > theirs.vocab_size:
            raise InputError(
                f"Distillation.top_k is {self.top_k}: the vocabulary has {theirs.vocab_size} tokens; null = all"
            )
        if self.hidden and _sizes(ours) != _sizes(theirs):
            raise InputError(
                f"{who}: it has {_sizes(theirs)} blocks and features and the student {_sizes(ours)}, so their hidden "
                "states cannot be compared; set Distillation.hidden to 0"
            )


def _sizes(config: Any) -> tuple[int, int]:
    return config.num_hidden_layers, config.hidden_size
