"""Calibration text that the model writes itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from lit_prune.errors import DiskError, InputError
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training import generated_text as subject


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


@pytest.mark.parametrize("use", ["train", "val", "test", "dataset"])
def test_it_is_for_calibration_only(use: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{use} is 'generated': text that the model writes"):
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
