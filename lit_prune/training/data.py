"""Text data as windows of tokens: training, validation, test and calibration sets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import InputError
from lit_prune.models.limits import check_tokens
from lit_prune.models.locate import asked_as
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.options import as_list
from lit_prune.training.generated_text import generated_sequences
from lit_prune.training.losses import Distillation
from lit_prune.training.parts import NAMES, Split
from lit_prune.training.resumable import ResumableLoader
from lit_prune.training.text_sources import GENERATED, hub_name, local_path, name_of, read_documents

if TYPE_CHECKING:
    from lit_prune.training.module import LitCausalLM

_DATASET = "dataset"
"""Word for the source ``data.dataset`` in ``data.calibration``."""
_MOST = 2**31 - 1
_MOST_WORKERS = 512
_MOST_TOKENS = 10**9
"""Maximum size of a calibration set in tokens: 8 GB of token ids; its hidden states take a thousand times that."""


class Windows(Dataset[dict[str, Tensor]]):
    """Dataset of token windows of equal length, as keyword arguments of the model."""

    def __init__(self, tokens: Tensor) -> None:
        """Store ``tokens`` ``[windows, seqlen]`` (int64)."""
        self.tokens = tokens

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one window: ``input_ids`` ``[seqlen]``."""
        return {"input_ids": self.tokens[index]}


class TextDataModule(LightningDataModule):
    """Text for training, evaluation and calibration.

    Documents are joined by blank lines, tokenised as a whole and cut into non-overlapping windows of ``seqlen`` tokens;
    the remainder is dropped. This is how the papers measure perplexity.

    A source is ``embedded`` (English prose that comes with Python), ``wikitext2``, ``c4``, any hub data set as ``name``
    or ``name:config``, or a local .txt, .jsonl or .parquet file. A file used for one purpose is read whole; a file used
    for several is split: the first eight tenths are for training and calibration, the ninth for validation and the last
    for the test, all cut between documents, paragraphs, lines or words. For training and calibration, a source may also
    be ``generated``: text that a model samples, cached on disk; the teacher in distillation, else the model itself.

    .. code-block:: yaml

        data: {dataset: wikitext2, calibration: c4, documents: long, sequences: 128, seqlen: 2048}
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        dataset: str = "wikitext2",
        train: dict[str, float] | Sequence[str] | str | None = None,
        val: str | None = None,
        test: str | None = None,
        calibration: dict[str, float] | Sequence[str] | str | None = None,
        sequences: int = 128,
        seqlen: int = 2048,
        batch_size: int = 1,
        calibration_batch_size: int = 4,
        documents: Literal["joined", "long"] = "joined",
        search_limit: int = 10_000,
        text_column: str = "text",
        seed: int = 0,
        num_workers: int = 0,
        max_windows: int | None = None,
        other_val: Sequence[str] | str = (),
        trust_remote_code: bool | None = None,
    ) -> None:
        """Validate and store the arguments; text is read when it is first needed.

        Args:
            tokenizer: Hub name, folder or GGUF file of the tokenizer; null = the model's own.
            dataset: Default source of the training, validation, test and calibration sets.
            train: Source of the training set, or several, as a list, or with weights, such as ``{dataset: 3, generated:
                1}``, which share the windows of an epoch in proportion. No window repeats within an epoch, so the text
                that runs out first sets its length. The word ``dataset`` refers to the option ``dataset``; null =
                ``dataset``.
            val: Source of the validation set; null = ``dataset``.
            test: Source of the test set; null = ``dataset``.
            calibration: Source of the calibration set, of which the training split is used, or ``generated``; or
                several, as a list, or with weights, such as ``{wikitext2: 3, c4: 1}``, which share the sequences in
                proportion. The word ``dataset`` refers to the option ``dataset``; null = ``dataset``.
            sequences: Number of calibration sequences, from all sources together.
            seqlen: Tokens per window, for training, evaluation and calibration.
            batch_size: Windows per training or evaluation batch.
            calibration_batch_size: Sequences per forward pass through a block while pruning.
            documents: Origin of calibration sequences: cut from the ``joined`` text, or one from each of the ``long``
                documents, those longer than one sequence, as the papers do with C4.
            search_limit: Maximum number of documents to read from a streamed data set, or to search for long ones.
            text_column: Name of the text column in a data set, .jsonl or .parquet file.
            seed: Seed of the calibration sample and of the order of training windows.
            num_workers: Number of worker processes that load batches.
            max_windows: Number of windows to train and evaluate on, counted from the first; null = all.
            other_val: Additional validation texts, to detect over-fitting to the training text; logged as
                ``val/perplexity/NAME``, and plotted in the report.
            trust_remote_code: Run code that comes with the tokenizer; null = as set for the model on the command line,
                else false.
        """
        super().__init__()
        counts = {
            "sequences": sequences,
            "batch_size": batch_size,
            "calibration_batch_size": calibration_batch_size,
            "search_limit": search_limit,
            "max_windows": max_windows,
        }
        for name, value in counts.items():
            if value is not None and not 1 <= value <= _MOST:
                raise InputError(f"data.{name} is {value}: it must be from 1 to {_MOST:,}")
        if not 0 <= num_workers <= _MOST_WORKERS:
            raise InputError(f"data.num_workers is {num_workers}: it must be from 0 to {_MOST_WORKERS}")
        if not 0 <= seed < 2**63:
            raise InputError(f"data.seed is {seed}: it must be from 0 to 2^63 - 1")
        if sequences * seqlen > _MOST_TOKENS:
            raise InputError(
                f"data.sequences is {sequences} and data.seqlen {seqlen}: their {8 * sequences * seqlen / 1e9:,.0f} GB "
                "are more than any calibration needs; the papers take 128 x 2,048"
            )
        other_val = as_list(other_val)
        self.calibration = _shares(_weights("calibration", calibration, dataset), sequences)
        """Number of calibration sequences from each source."""
        self.train = _weights("train", train, dataset)
        """Weights of the training texts, by source."""
        several = [("calibration", source) for source in self.calibration]
        several += [("train", source) for source in self.train]
        several += [("other_val", source) for source in other_val]
        named = {"val": val, "test": test, "dataset": dataset}
        self._options = [*named.items(), *several]
        for name, source in self._options:
            if source is not None and not source.partition(":")[0].strip():
                raise InputError(f"data.{name} is {source!r}: name a text source, such as wikitext2 or a .txt file")
        for name, source in self._options:
            if source == GENERATED and name not in ("calibration", "train"):
                raise InputError(
                    f"data.{name} is {source!r}: text that a model samples is for data.train and data.calibration"
                )
        if set(self.train) == {GENERATED}:
            raise InputError(
                f"data.train is {GENERATED!r}, which has no end: name another text too, such as "
                "{dataset: 1, generated: 1}"
            )
        names = validation_names(other_val)
        if len(set(names)) < len(names):
            raise InputError(f"data.other_val is {other_val}: two texts have one name, under which they are logged")
        if seqlen < 2:
            raise InputError(
                f"data.seqlen is {seqlen}: it must be at least 2, so that there is a next token to predict"
            )
        self.tokenizer = tokenizer
        self.sources = {"val": val or dataset, "test": test or dataset}
        self._tokenized: dict[tuple[str, Split], Tensor] = {}
        self.sequences = sequences
        self.seqlen = seqlen
        self.batch_size = batch_size
        self.calibration_batch_size = calibration_batch_size
        self.documents = documents
        self.search_limit = search_limit
        self.text_column = text_column
        self.seed = seed
        self.num_workers = num_workers
        self.max_windows = max_windows
        self.other_val = other_val
        self.trust_remote_code = trust_remote_code
        self._tokenizer_option = "data.tokenizer"
        self._writer: LitCausalLM | None = None

    def use_tokenizer_of(self, model: LitCausalLM) -> None:
        """Use the tokenizer of a model, unless the data has one of its own, and the model for generated text."""
        self._writer = model
        if self.tokenizer is None:
            self.tokenizer, self._tokenizer_option = model.pretrained, "model.pretrained"
            if self.trust_remote_code is None:
                self.trust_remote_code = model.trust_remote_code

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError("data.tokenizer is null: name the model that the text is for")
        with asked_as(self._tokenizer_option):
            return load_tokenizer(self.tokenizer, bool(self.trust_remote_code))

    @property
    def test_text(self) -> str:
        """Description of the test text, for reports."""
        return self._name_of(self.sources["test"], "test")

    @property
    def calibration_text(self) -> str:
        """Description of the text from which the calibration set is sampled, for reports."""
        names = {self._name_of(source, "train"): count for source, count in self.calibration.items()}
        if len(names) == 1:
            return next(iter(names))
        return ", ".join(f"{name} ({count} of {self.sequences})" for name, count in names.items())

    def _name_of(self, source: str, split: Split) -> str:
        if source == GENERATED:
            return name_of(source)
        if local_path(source) is None:
            return f"{split} text of {name_of(source)}"
        return f"{NAMES[split] if self._divided(source) else 'all'} of {source}"

    def _divided(self, source: str) -> bool:
        """Return whether a source is a file used for several purposes, even under different paths."""
        validation = [self.sources["val"], *self.other_val]
        uses: dict[Split, list[str]] = {
            "train": [*self.train, *self.calibration],
            "validation": validation,
            "test": [self.sources["test"]],
        }
        return sum(any(_same_file(source, other) for other in others) for others in uses.values()) > 1

    def setup(self, stage: str) -> None:
        """Read the texts of a stage, so that an unreadable text raises an error before a model is loaded."""
        trainer: Any = self.trainer
        if stage == "fit" and trainer is not None and trainer.limit_train_batches:
            for source in self.train:
                if source != GENERATED:
                    self._tokens(source, "train")
        if stage in ("fit", "validate") and trainer is not None and trainer.limit_val_batches:
            for source in (self.sources["val"], *self.other_val):
                self._windows(source, "validation")
        if stage == "test":
            self._windows(self.sources["test"], "test")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of shuffled training windows, sharded over processes and resumable within an epoch."""
        windows = Windows(self._training_windows)
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        order = self._order(windows)
        return ResumableLoader(windows, self.batch_size, sampler=order, num_workers=self.num_workers, limit=limit)

    @cached_property
    def _training_windows(self) -> Tensor:
        """Windows of an epoch, ``[windows, seqlen]``: of each text a number in proportion to its weight."""
        texts = {source: self._windows(source, "train") for source in self.train if source != GENERATED}
        if len(self.train) == 1:
            return next(iter(texts.values()))
        each = min(len(windows) / self.train[source] for source, windows in texts.items())  # for a weight of 1
        if self.max_windows is not None:
            each = min(each, self.max_windows / sum(self.train.values()))
        counts = {source: round(each * weight) for source, weight in self.train.items()}
        short = next((source for source, count in counts.items() if not count), None)
        if short is not None:
            raise InputError(
                f"data.train gives {short!r} the weight {self.train[short]:g}: not one window of an epoch is left to it"
            )
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        for source, count in counts.items():
            if source == GENERATED:
                parts.append(self._generated(count))
            else:  # a sample of the whole text, not its beginning
                parts.append(texts[source][torch.randperm(len(texts[source]), generator=generator)[:count]])
        return torch.cat(parts)

    def _order(self, windows: Windows) -> DistributedSampler[Any] | None:
        """Return the sampler of training windows; None = sequential, if ``overfit_batches`` is set."""
        share = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None:
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]
                return None
            share = self.trainer.distributed_sampler_kwargs or share
        return DistributedSampler(windows, share["num_replicas"], share["rank"], shuffle=True, seed=self.seed)

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Return loaders of the validation windows in order, then of each additional validation text."""
        sources = [self.sources["val"], *self.other_val]
        return [self._loader(self._windows(source, "validation")) for source in sources]

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of the test windows in order."""
        return self._loader(self._windows(self.sources["test"], "test"))

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Raise ``InputError`` for token ids that the model cannot process, while they are still in CPU memory."""
        model = getattr(self.trainer and self.trainer.lightning_module, "model", None)
        if model is not None:
            check_tokens(model, batch["input_ids"])
        return batch

    def hub_names(self, training: bool) -> list[str]:
        """Return the hub names of the calibration set and, if ``training``, of the training set."""
        sources = {*self.calibration, *self.train} if training else set(self.calibration)
        return sorted(name for name in map(hub_name, sources) if name)

    def calibration_batches(self) -> list[Tensor]:
        """Return the calibration set, a seeded sample: batches of token ids ``[sequences, seqlen]`` (int64).

        Raises:
            InputError: if the text is shorter than one sequence, or too few documents are long enough.
        """
        return list(torch.split(self._calibration_sample, self.calibration_batch_size))

    @cached_property
    def _calibration_sample(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        parts = [self._sample(source, count, generator) for source, count in self.calibration.items()]
        if len(parts) == 1:
            return parts[0]
        # Every batch, and every process, gets some of each text.
        return torch.cat(parts)[torch.randperm(self.sequences, generator=generator)]

    def _sample(self, source: str, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` windows of the training split of a source, ``[count, seqlen]``."""
        if source == GENERATED:
            return self._generated(count)
        if self.documents == "long":
            return self._sample_long(source, count, generator)
        return _random_windows(self._tokens(source, "train"), self.seqlen, generator, count)

    def _generated(self, count: int) -> Tensor:
        """Return ``count`` windows that the teacher samples in distillation, else the model as it is on disk."""
        writer = self._writer
        if writer and isinstance(writer.loss, Distillation):
            teacher = writer.loss.teacher
            settings = teacher.pretrained, teacher.dtype, teacher.trust_remote_code
            return generated_sequences(*settings, count, self.seqlen, self.seed)
        pretrained = writer.pretrained if writer else self.tokenizer
        if pretrained is None:
            raise InputError("the text is 'generated' and data.tokenizer null: name the model")
        if writer and writer.lazy:
            raise InputError("the text is 'generated': a model that stays on disk (model.lazy) cannot write it")
        dtype = getattr(torch, writer.dtype_name) if writer and writer.dtype_name != "auto" else None
        trusted = bool(self.trust_remote_code)
        return generated_sequences(pretrained, dtype, trusted, count, self.seqlen, self.seed)

    def _sample_long(self, source: str, count: int, generator: torch.Generator) -> Tensor:
        """Return one window from each long document, in random order, searching at most ``search_limit`` documents."""
        documents = self._read(source, "train")
        found: list[Tensor] = []
        order = torch.randperm(len(documents), generator=generator)[: self.search_limit].tolist()
        for index in order:
            tokens = self._encode(documents[index])
            if len(tokens) > self.seqlen:
                found.append(_random_windows(tokens, self.seqlen, generator, count=1))
            if len(found) == count:
                return torch.cat(found)
        raise InputError(
            f"data.calibration is {source!r}: of {len(order)} documents, {len(found)} are longer than "
            f"{self.seqlen} tokens and {count} are needed; lower --data.seqlen or --data.sequences, raise "
            "--data.search_limit, or use --data.documents joined"
        )

    def _windows(self, source: str, split: Split) -> Tensor:
        tokens = self._tokens(source, split)
        windows = tokens[: len(tokens) // self.seqlen * self.seqlen].reshape(-1, self.seqlen)
        return windows[: self.max_windows]

    def _tokens(self, source: str, split: Split) -> Tensor:
        """Return the tokens of a text, ``[tokens]``; the text is read and tokenised only once."""
        if (source, split) not in self._tokenized:
            tokens = self._encode("\n\n".join(self._read(source, split)))
            if len(tokens) < self.seqlen:
                raise InputError(
                    f"{self._part(source, split)} {len(tokens)} tokens, fewer than one sequence of {self.seqlen}: "
                    "give a longer text or lower --data.seqlen"
                )
            self._tokenized[source, split] = tokens
        return self._tokenized[source, split]

    def _read(self, source: str, split: Split) -> list[str]:
        try:
            return read_documents(source, split, self.text_column, self.search_limit, self._divided(source))
        except InputError as error:
            raise InputError(f"data.{self._option(source)}: {error}") from error

    def _option(self, source: str) -> str:
        """Return the name of the option that a source was given for."""
        return next(name for name, given in self._options if given == source)

    def _part(self, source: str, split: Split) -> str:
        part = f"of which the {NAMES[split]}, for {split}, has" if self._divided(source) else "which has"
        return f"data.{self._option(source)} is {source!r}, {part}"

    def _encode(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)

    def _loader(self, tokens: Tensor) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Windows(tokens), self.batch_size, num_workers=self.num_workers)


def validation_names(other_val: Sequence[str]) -> list[str]:
    """Return the names under which additional validation texts are logged: their sources without folder and suffix.

    Loggers use the names as paths and tags, so any characters but letters, digits, ``.``, ``-`` and ``_`` become ``_``.
    """
    return [re.sub(r"[^\w.-]+", "_", Path(source).stem) for source in other_val]


def _weights(option: str, given: Mapping[str, float] | Sequence[str] | str | None, dataset: str) -> dict[str, float]:
    """Return the weights of an option's sources; those of a list are equal.

    Args:
        option: name of the option.
        given: source, list of sources, or weights by source; None = ``dataset``.
        dataset: source that the word ``dataset`` refers to; if it is named as well, the weights add up.
    """
    given = _DATASET if given is None else given
    weights = given if isinstance(given, Mapping) else as_list(given)
    named = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, 1.0)
    if len(named) < len(weights) or not named:
        raise InputError(f"data.{option} is {weights!r}: name each text once, such as [wikitext2, c4]")
    for source, weight in named.items():
        if not 0 < weight < math.inf:
            raise InputError(f"data.{option} gives {source!r} the weight {weight!r}: it must be positive")
    if _DATASET in named:
        named = {dataset: named.pop(_DATASET) + named.pop(dataset, 0.0)} | named
    return named


def _shares(named: Mapping[str, float], total: int) -> dict[str, int]:
    """Return how many of ``total`` calibration sequences come from each source, by largest remainder."""
    exact = {source: total * weight / sum(named.values()) for source, weight in named.items()}
    counts = {source: int(share) for source, share in exact.items()}
    by_remainder = sorted(exact, key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: total - sum(counts.values())]:
        counts[source] += 1
    for source, count in counts.items():
        if not count:
            raise InputError(
                f"data.calibration leaves none of the {total} sequences to {source!r}: raise --data.sequences or its "
                "weight"
            )
    return counts


def _same_file(source: str, other: str) -> bool:
    path, other_path = local_path(source), local_path(other)
    return path is not None and other_path is not None and path.samefile(other_path)


def _random_windows(tokens: Tensor, seqlen: int, generator: torch.Generator, count: int) -> Tensor:
    """Return ``count`` windows ``[count, seqlen]`` at random positions of a text of at least ``seqlen`` tokens."""
    starts = torch.randint(len(tokens) - seqlen + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(seqlen)]
