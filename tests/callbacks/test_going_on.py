"""Gradual pruning without regrowth, training that goes on for longer, and training on a few batches alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.allocators import AlphaPruning
from lit_prune.callbacks import KeepMasks, Prune
from lit_prune.ops import NM
from lit_prune.pruning import Cubic, PruningPlan
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, TextDataModule, WarmupCosine
from support.training import LLAMA, trainer

LONGER = {**LLAMA, "num_hidden_layers": 4, "num_attention_heads": 2}


def fit(*callbacks: Callback, steps: int, resume: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    schedule = options.pop("schedule", None)
    module = LitCausalLM("random", config=LONGER, lr_scheduler=schedule)
    data = TextDataModule("random", dataset="embedded", seqlen=16, sequences=2, max_windows=40, batch_size=2)
    runner = trainer(*callbacks, max_steps=steps, **{"limit_val_batches": 0, **options})
    runner.fit(module, datamodule=data, ckpt_path=resume)
    return runner


def test_uneven_nm_is_reached_gradually_without_regrowth() -> None:
    plan = PruningPlan(NM(4, 8), Magnitude(), AlphaPruning(epsilon=0.3), output_error=False)
    prune = Prune(plan, Cubic(start=0, end=8, every=1), regrowth=False)
    fit(prune, KeepMasks(), steps=8)
    assert prune.report is not None
    widest = max(layer.numel for layer in prune.report.layers)
    total = sum(layer.numel for layer in prune.report.layers)
    assert abs(prune.report.sparsity - 0.5) * total <= widest / 8
    assert len({layer.asked for layer in prune.report.layers}) > 1


class Rates(Callback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("total", [None, 6])
def test_more_steps_after_a_resume_have_a_rate(total: int | None, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=6)
    fit(checkpoint, steps=6, schedule=lambda optimizer: WarmupCosine(optimizer, total=total))
    rates = Rates()
    fit(
        rates,
        steps=12,
        schedule=lambda o: WarmupCosine(o, total=total),
        resume=tmp_path / "end.ckpt",
    )
    straight = Rates()
    fit(straight, steps=12, schedule=lambda o: WarmupCosine(o, total=total))
    assert rates.rates == straight.rates[6:]
    assert (rates.rates[0] > 0) == (total is None)  # a total that the user gave stays


def test_overfitting_sees_the_same_batches_in_each_epoch() -> None:
    seen: list[list[int]] = []

    class See(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, *args: Any) -> None:
            seen.append(batch["input_ids"].flatten().tolist())

    fit(See(), steps=6, overfit_batches=2)
    assert seen[:2] == seen[2:4] == seen[4:6] and seen[0] != seen[1]
