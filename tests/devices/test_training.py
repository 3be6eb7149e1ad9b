"""Training with Lightning on the device: masks hold, and the exported folder has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_prune.callbacks import Export, KeepMasks, Prune
from lit_prune.checkpoint.masks import check_masks_hold
from lit_prune.checkpoint.save import save_pruned
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import Unstructured
from lit_prune.pruning import Cubic, PruningPlan
from lit_prune.scorers import GBLM, Magnitude, Wanda
from lit_prune.solvers import SparseGPT
from lit_prune.training import Distillation, LitCausalLM, LoRA, NormsAndBiases, TextDataModule
from support.mock_device import MOCK, host_reads
from support.training import SMALLER

MAGNITUDE = PruningPlan(Unstructured(0.5), Magnitude())


class MockAccelerator(Accelerator):
    """What Lightning asks of a device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is to be done."""

    def teardown(self) -> None:
        """Nothing is to be done."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(MOCK, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return MOCK


def trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    """Return a trainer on the device, which says nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    on = SingleDeviceStrategy(torch.device(MOCK, 0), accelerator=MockAccelerator())
    return Trainer(
        strategy=on,
        callbacks=list(callbacks),
        enable_checkpointing=checkpoints,
        max_steps=4,
        limit_val_batches=1,
        **{**quiet, **options},
    )


def dense(folder: Path) -> str:
    """Save a dense model, and return its folder."""
    torch.manual_seed(0)
    save_pruned(folder / "dense", load_model("random", config=SMALLER), load_tokenizer("random"), {}, {})
    return str(folder / "dense")


def data() -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=16, sequences=2, max_windows=16, batch_size=2)


def module(pretrained: str, **options: Any) -> LitCausalLM:
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    return LitCausalLM(pretrained, optimizer=optimizer, **options)


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "all weights": lambda model: {},
    "norms and biases": lambda model: {"module": {"trainable": NormsAndBiases()}},
    "LoRA": lambda model: {"module": {"trainable": LoRA(4, norms_and_biases=True)}},
    "LoRA without masks": lambda model: {"module": {"trainable": LoRA(4, masked=False)}},
    "distillation": lambda model: {"module": {"loss": Distillation(model, hidden=1.0, dtype="float32")}},
    "schedule": lambda model: {"schedule": Cubic(start=0, end=3, every=1)},
    "Wanda": lambda model: {"plan": PruningPlan(Unstructured(0.5), Wanda())},
    "GBLM": lambda model: {"plan": PruningPlan(Unstructured(0.5), GBLM())},
    "SparseGPT": lambda model: {"plan": PruningPlan(Unstructured(0.5), solver=SparseGPT())},
    "autocast": lambda model: {"trainer": {"plugins": MixedPrecision("bf16-mixed", device=MOCK)}},
    "bfloat16": lambda model: {"trainer": {"precision": "bf16-true"}},
}


@pytest.mark.parametrize("name", CASES)
def test_masks_hold(name: str, tmp_path: Path) -> None:
    pretrained = dense(tmp_path)
    case = CASES[name](pretrained)
    pruning = Prune(case.get("plan", MAGNITUDE), case.get("schedule"))
    trained = module(pretrained, **case.get("module", {}))
    callbacks = [pruning, KeepMasks(), Export(str(tmp_path / "out"))]
    with host_reads() as found:
        trainer(callbacks, **case.get("trainer", {})).fit(trained, data())
    assert found, "nothing was computed on the device"
    exported = load_model(str(tmp_path / "out"))
    check_masks_hold(exported, pruning.report.masks)
    zeros = sum(int((weight == 0).sum()) for weight in exported.parameters())
    assert zeros >= sum(mask.unpack().logical_not().sum().item() for mask in pruning.report.masks.values()) > 0


def test_a_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    pretrained = dense(tmp_path)
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = module(pretrained)
    trainer([Prune(MAGNITUDE), KeepMasks(), saved]).fit(whole, data())
    resumed = module(pretrained)
    trainer([Prune(MAGNITUDE), KeepMasks()]).fit(resumed, data(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(actual.cpu() == 0, expected.cpu() == 0), name
