"""Text that the model, or a teacher, samples for calibration and training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from lit_prune.errors import DiskError, InputError
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training import generated_text as subject
from lit_prune.training.losses import Distillation, Loss


@pytest.fixture
def folder(tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a tokenizer, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    tiny_model().save_pretrained(tmp_path / "model")
    load_tokenizer("random").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sequences(folder: Path, **options: object) -> Tensor:
    settings = {"dataset": "embedded", "calibration": "generated", "sequences": 6, "seqlen": 8, **options}
    return torch.cat(TextDataModule(str(folder), **settings).calibration_batches())  # type: ignore[arg-type]


def test_it_is_sampled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = subject.sample_sequences

    def counting(*args: object) -> Tensor:
        calls.append(1)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(subject, "sample_sequences", counting)
    first = sequences(folder)
    assert first.shape == (6, 8) and torch.equal(sequences(folder), first) and len(calls) == 1
    for change in ({"seed": 1}, {"sequences": 5}, {"seqlen": 9}):
        sequences(folder, **change)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a file of tensors", r"cannot be read as safetensors \(.*\); delete '.*safetensors'"),
        (save({"words": torch.zeros(6, 8)}), "'tokens' is missing; delete"),
        (save({"tokens": torch.zeros(6, 7, dtype=torch.int64)}), r"int64 of the shape \[6, 7\] in place of"),
        (save({"tokens": torch.zeros(6, 8)}), r"float32 of the shape \[6, 8\] in place of the tokens: delete it"),
    ],
)
def test_a_damaged_cache_is_named(folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    sequences(folder)
    [path] = (tmp_path / "cache" / "lit-prune").glob("*.safetensors")
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        sequences(folder)
    path.unlink()
    assert sequences(folder).shape == (6, 8)


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DiskError, match=r"stored in '\S+lit-prune' \(.*\); set HF_HOME to a folder that"):
        sequences(folder)


def test_a_killed_sampling_leaves_no_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a partial file nor a lock that a later run would wait for."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(subject, "sample_sequences", killed)
        with pytest.raises(KeyboardInterrupt):
            sequences(folder)
    assert not list((tmp_path / "cache" / "lit-prune").glob("*.safetensors"))
    assert sequences(folder).shape == (6, 8)


def test_other_weights_write_another_text(folder: Path, tiny_model: Callable[..., nn.Module]) -> None:
    first = sequences(folder)
    tiny_model(seed=1).save_pretrained(folder)
    assert not torch.equal(sequences(folder), first)


def test_it_mixes_with_other_texts_and_is_named(folder: Path) -> None:
    data = TextDataModule(
        str(folder), dataset="embedded", calibration={"embedded": 1, "generated": 2}, sequences=6, seqlen=8
    )
    assert torch.cat(data.calibration_batches()).shape == (6, 8)
    generated = "text that the model generated (4 of 6)"
    assert data.calibration_text == f"train text of Python's documentation (embedded) (2 of 6), {generated}"
    assert data.hub_names(training=False) == []


def test_the_models_own_dtype_and_trust_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    real = subject.load_model
    monkeypatch.setattr(subject, "load_model", lambda *args, **more: seen.append((*args, more)) or real(*args, **more))
    data = TextDataModule(dataset="embedded", calibration="generated", sequences=1, seqlen=8)
    data.use_tokenizer_of(LitCausalLM(str(folder), dtype="bfloat16"))
    data.calibration_batches()
    assert seen == [(str(folder), torch.bfloat16, {"trust_remote_code": False})]


def test_it_is_a_part_of_the_training_text_by_the_teacher(folder: Path, tiny_model: Callable[..., nn.Module]) -> None:
    # Of the weights 3 and 1: an epoch takes all windows of the text, and generates a third as many.
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"word{k}" for k in range(40)))
    whole = TextDataModule(str(folder), dataset=str(text), train=str(text), val="embedded", test="embedded", seqlen=8)
    count = len(whole.train_dataloader().dataset)  # type: ignore[arg-type]
    student, teacher = folder.parent / "student", str(folder)
    tiny_model(seed=1).save_pretrained(student)
    load_tokenizer("random").save_pretrained(student)

    def windows(loss: Loss | None) -> Tensor:
        data = TextDataModule(
            train={str(text): 3, "generated": 1}, dataset="embedded", calibration="embedded", sequences=1, seqlen=8
        )
        data.use_tokenizer_of(LitCausalLM(str(student), loss=loss))
        return data.train_dataloader().dataset.tokens  # type: ignore[attr-defined]

    found = windows(Distillation(teacher, dtype="float32"))
    assert len(found) == count + round(count / 3)
    own = {tuple(window) for window in whole.train_dataloader().dataset.tokens.tolist()}  # type: ignore[attr-defined]
    assert {tuple(window) for window in found[:count].tolist()} == own  # each once
    expected = subject.generated_sequences(teacher, torch.float32, False, round(count / 3), 8, 0)
    assert torch.equal(found[count:], expected)
    by_student = subject.generated_sequences(str(student), None, False, round(count / 3), 8, 0)
    assert torch.equal(windows(None)[count:], by_student) and not torch.equal(by_student, expected)


def test_training_texts_share_an_epoch_in_proportion(folder: Path) -> None:
    short, long = folder.parent / "short.txt", folder.parent / "long.txt"
    short.write_text("one two three " * 20)
    long.write_text("four five six seven " * 200)

    def counts(**options: Any) -> tuple[int, int]:
        data = TextDataModule(str(folder), dataset="embedded", calibration="embedded", sequences=1, seqlen=8, **options)
        windows = data.train_dataloader().dataset.tokens  # type: ignore[attr-defined]
        known = {tuple(w) for w in data._windows(str(short), "train").tolist()}
        of_short = sum(tuple(window) in known for window in windows.tolist())
        return of_short, len(windows) - of_short

    of_short, _ = counts(train=str(short))
    assert counts(train=[str(short), str(long)]) == (of_short, of_short)
    assert counts(train={str(short): 1, str(long): 2}) == (of_short, 2 * of_short)
    assert counts(train={str(short): 1, str(long): 2}, max_windows=6) == (2, 4)
    with pytest.raises(InputError, match=r"gives '\S+short.txt' the weight 0\.001: not one window"):
        counts(train={str(short): 1e-3, str(long): 1})
    with pytest.raises(InputError, match=r"data\.train gives '\S+long.txt' the weight 0: it must be positive"):
        counts(train={str(short): 1, str(long): 0})


def test_generated_text_alone_has_no_end() -> None:
    with pytest.raises(InputError, match=r"data\.train is 'generated', which has no end: name another text too"):
        TextDataModule("random", dataset="embedded", train="generated")


@pytest.mark.parametrize("use", ["val", "test", "dataset"])
def test_it_is_for_calibration_and_training_only(use: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{use} is 'generated': text that a model samples"):
        TextDataModule("random", **{"dataset": "embedded", use: "generated"})  # type: ignore[arg-type]


def test_models_that_cannot_write_are_refused(folder: Path, tmp_path: Path) -> None:
    def asked(model: LitCausalLM | None, tokenizer: str | None = None) -> TextDataModule:
        data = TextDataModule(tokenizer, dataset="embedded", calibration="generated", sequences=1, seqlen=8)
        if model:
            data.use_tokenizer_of(model)
        return data

    for data, message in (
        (asked(LitCausalLM("random", config={"model_type": "llama"})), "is 'random': such a model has no text"),
        (asked(LitCausalLM(str(folder), lazy=str(tmp_path / "lazy"))), r"stays on disk \(model.lazy\) cannot"),
        (asked(None), "data.tokenizer null: name the model"),
    ):
        with pytest.raises(InputError, match=message):
            data.calibration_batches()
