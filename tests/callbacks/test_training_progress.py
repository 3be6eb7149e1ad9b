"""The progress of a training on a terminal, and in a log file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_prune.callbacks import KeepMasks, Prune, TrainingProgress
from lit_prune.ops import PackedMask, Unstructured
from lit_prune.ops.masks import sparsity_of
from lit_prune.pruning import PruningPlan
from lit_prune.scorers import Magnitude
from lit_prune.trainer import PruningTrainer
from lit_prune.training import LitCausalLM, TextDataModule
from support.training import SMALLER


class Shown(Callback):
    """Keeps the last figures of the progress bar, and the epoch's name."""

    figures: dict[str, Any]
    epoch: str

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        bar = next(callback for callback in trainer.callbacks if isinstance(callback, TrainingProgress))  # type: ignore
        self.figures, self.epoch = bar.get_metrics(trainer, pl_module), bar._get_train_description(0)


def fit(folder: Path, *callbacks: Callback, **options: Any) -> PruningTrainer:
    data = TextDataModule("random", dataset="embedded", seqlen=16, sequences=2, max_windows=8, batch_size=2)
    options = {"accelerator": "cpu", "logger": False, "max_steps": 4, "limit_val_batches": 1, **options}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    prune = Prune(PruningPlan(Unstructured(0.75), Magnitude(), output_error=False))
    trainer = PruningTrainer(callbacks=[prune, KeepMasks(), *callbacks], **options)
    trainer.fit(LitCausalLM("random", config=SMALLER), datamodule=data)
    return trainer


def test_step_and_sparsity_are_shown_and_the_epoch_is_not_minus_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Shown()
    fit(tmp_path, shown)
    assert list(shown.figures)[:2] == ["step", "sparsity"]
    assert shown.figures["step"] == "4/4" and shown.figures["sparsity"] == "75.0%"
    assert "train/loss" in shown.figures and shown.epoch.strip() == "Epoch 0"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert line.startswith("step 4/4, sparsity 75.0%, ") and "val/perplexity " in line and "train/loss " in line


def test_the_last_epoch_is_named_if_there_is_one(tmp_path: Path) -> None:
    shown = Shown()
    fit(tmp_path, shown, max_steps=-1, max_epochs=2)
    assert shown.epoch.strip() == "Epoch 0/1" and shown.figures["step"] == "8"


def test_another_bar_or_none_takes_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(isinstance(c, TrainingProgress) for c in fit(tmp_path, TQDMProgressBar()).callbacks)  # type: ignore
    assert not any(isinstance(c, TrainingProgress) for c in fit(tmp_path, enable_progress_bar=False).callbacks)  # type: ignore
    capsys.readouterr()


def test_on_a_terminal_there_is_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = SimpleNamespace(is_terminal=True)
    monkeypatch.setattr("lit_prune.callbacks.training_progress.Console", lambda: terminal)
    trainer = fit(tmp_path)
    assert "step 4/4, " not in capsys.readouterr().out
    assert trainer.progress_bar_callback.progress is not None  # type: ignore[union-attr]


def test_elsewhere_no_bar_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its thread would sleep up to a second before each evaluation ends."""
    assert fit(tmp_path).progress_bar_callback.progress is None  # type: ignore[union-attr]
    capsys.readouterr()


def test_the_sparsity_of_masks_counts_weights() -> None:
    masks = [
        PackedMask.pack(torch.tensor([[True, False, False], [True, True, False]])),
        PackedMask.pack(torch.eye(2) > 0),
    ]
    assert sparsity_of(masks) == pytest.approx(1 - (3 + 2) / (6 + 4))
