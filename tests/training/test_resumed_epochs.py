"""Training that goes on, in the middle and at the end of an epoch, where Lightning decides how long an epoch is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.training import LitCausalLM, TextDataModule
from support.training import SMALLER, trainer


class Seen(Callback):
    """Notes the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["input_ids"].flatten().tolist())


def fit(*callbacks: Callback, resume: Path | None = None, num_workers: int = 0, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module = LitCausalLM("random", config=SMALLER)
    data = TextDataModule("random", "embedded", seqlen=8, max_windows=10, batch_size=2, num_workers=num_workers)
    runner = trainer(*callbacks, limit_val_batches=0, **options)
    runner.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 5, "limit_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 0.7},  # three of five
        {"max_steps": 5, "overfit_batches": 3, "num_workers": 2},
    ],
)
def test_epochs_that_lightning_cuts_short_go_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    straight, checkpoint = Seen(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    expected = fit(straight, checkpoint, **options)
    for stop in (2, 3):  # in the middle of an epoch, and at its end
        resumed = Seen()
        weights = fit(resumed, resume=tmp_path / f"step={stop}.ckpt", **options)
        assert resumed.batches == straight.batches[stop:]
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
