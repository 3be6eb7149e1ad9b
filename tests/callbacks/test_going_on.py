"""Gradual pruning without regrowth, training that goes on for longer, and training on a few batches alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.allocators import AlphaPruning
from lit_prune.callbacks import KeepMasks, Prune
from lit_prune.errors import InputError
from lit_prune.ops import NM
from lit_prune.pruning import Cubic, PruningPlan
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, NormsAndBiases, TextDataModule, WarmupCosine
from support.training import LLAMA, trainer

LONGER = {**LLAMA, "num_hidden_layers": 4, "num_attention_heads": 2}


def fit(*callbacks: Callback, steps: int, resume: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    schedule = options.pop("schedule", None)
    config, trainable = options.pop("config", LONGER), options.pop("trainable", None)
    module = LitCausalLM("random", config=config, lr_scheduler=schedule, trainable=trainable)
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


def changed(checkpoint: Path, **content: Any) -> Path:
    """Write a copy of a checkpoint with other entries; None leaves one out."""
    entries = {**torch.load(checkpoint, weights_only=True), **content}
    other = checkpoint.with_name("other.ckpt")
    torch.save({name: value for name, value in entries.items() if value is not None}, other)
    return other


def pruning() -> list[Callback]:
    return [Prune(PruningPlan(NM(2, 4), Magnitude(), output_error=False)), KeepMasks()]


def test_what_cannot_go_on_is_told_before_the_first_step(tmp_path: Path) -> None:
    fit(*pruning(), ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=2), steps=2)
    end = tmp_path / "end.ckpt"
    state = torch.load(end, weights_only=True)["state_dict"]
    name = next(iter(state))
    for content, message in (
        ({"state_dict": {**state, name: state[name] * torch.nan}}, f"{name} holds NaN or Inf"),
        ({"optimizer_states": None}, "it holds no optimizer_states, as save_weights_only leaves them out"),
        ({"callbacks": {}}, "after the last pruning of the schedule (step 0), and holds no masks"),
        ({"callbacks": {"Prune": {"pruned_at": 0}}}, "state of Prune is damaged ('masks' is missing)"),
    ):
        with pytest.raises(InputError) as raised:
            fit(*pruning(), steps=4, resume=changed(end, **content))
        assert message in str(raised.value)
    with pytest.raises(InputError, match=r"model\.trainable was 'Everything' and is now 'NormsAndBiases'"):
        fit(*pruning(), steps=4, resume=end, trainable=NormsAndBiases())
    with pytest.raises(InputError, match="the checkpoint is not of the model 'random' that trains Everything"):
        fit(*pruning(), steps=4, resume=end, config={**LONGER, "num_hidden_layers": 2})
