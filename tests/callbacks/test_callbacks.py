"""Pruning while training, keeping masks and exporting, on one device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.callbacks import Export, KeepMasks, Prune
from lit_prune.errors import InputError
from lit_prune.models.io import check_masks_hold, load_masks, load_model
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import Cubic, OneShot, PruningPlan, Schedule
from lit_prune.scorers import Magnitude, Wanda
from lit_prune.training import LitCausalLM, TextDataModule

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, weight_decay=0.1),
}


def data(windows: int = 64) -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=16, sequences=4, max_windows=windows, batch_size=2)


def lit(optimizer: str = "adamw") -> LitCausalLM:
    torch.manual_seed(0)
    return LitCausalLM("random", config=LLAMA, optimizer=OPTIMIZERS[optimizer])


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    return Trainer(**{**quiet, "max_steps": 8, "limit_val_batches": 2, **options}, callbacks=list(callbacks))


def wanda(schedule: Schedule | None = None, sparsity: float = 0.5) -> Prune:
    return Prune(PruningPlan(Unstructured(sparsity), Wanda()), schedule)


class History(Callback):
    """Records the sparsity of the model after every optimizer step."""

    def __init__(self) -> None:
        self.sparsity: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        weights = [m.weight for n, m in module.model.named_modules() if n.endswith("_proj")]
        zeros = sum(int((w == 0).sum()) for w in weights)
        self.sparsity[trainer.global_step] = zeros / sum(w.numel() for w in weights)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradual_pruning_reaches_each_sparsity_and_holds_it(optimizer: str, precision: str) -> None:
    prune, history = wanda(Cubic(start=2, end=6, every=2, initial=0.2), sparsity=0.6), History()
    module = lit(optimizer)
    options = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer(prune, KeepMasks(), history, enable_checkpointing=False, **options).fit(module, data())
    expected = {0: 0.0, 1: 0.0, 2: 0.2, 3: 0.2, 4: 0.55, 5: 0.55, 6: 0.6, 7: 0.6, 8: 0.6}
    assert history.sparsity == pytest.approx({k: expected[k] for k in history.sparsity}, abs=0.01)
    assert prune.report is not None
    check_masks_hold(module.model, prune.report.masks)


def test_without_keep_masks_weights_come_back_and_export_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"_proj\.weight: \d+ pruned weights are not zero"):
        trainer(wanda(), Export(str(tmp_path / "out")), enable_checkpointing=False).fit(lit(), data())
    assert not (tmp_path / "out").exists()


def test_the_audit_names_a_revived_weight() -> None:
    class Revive(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            module.model.model.layers[1].mlp.up_proj.weight.data.add_(1.0)

    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: "):
        trainer(wanda(), KeepMasks(), Revive(), enable_checkpointing=False).fit(lit(), data())


def test_kept_weights_train(tmp_path: Path) -> None:
    module = lit()
    module.configure_model()
    before = module.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    prune = wanda()
    trainer(prune, KeepMasks(), enable_checkpointing=False).fit(module, data())
    assert prune.report is not None
    keep = prune.report.masks["model.layers.0.mlp.up_proj.weight"].unpack()
    after = module.model.model.layers[0].mlp.up_proj.weight
    assert (after[keep] != before[keep]).all() and (after[~keep] == 0).all()


def test_export_writes_a_folder_with_verified_masks(tmp_path: Path) -> None:
    prune = Prune(PruningPlan(NM(2, 4), Magnitude()), OneShot(3))
    module = lit()
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out")), enable_checkpointing=False).fit(module, data())
    loaded = load_model(str(tmp_path / "out"))
    check_masks_hold(loaded, load_masks(tmp_path / "out"))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in module.model.state_dict().items())
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(InputError, match="it exists and is kept"):
        trainer(prune, Export(str(tmp_path / "out")), enable_checkpointing=False).fit(lit(), data())


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_equals_one_without_a_stop(tmp_path: Path, stop: int) -> None:
    # One batch per epoch, so that every step is at the end of one: the data loader itself cannot be resumed.
    schedule = Cubic(start=2, end=6, every=2)
    straight = lit()
    whole = wanda(schedule)
    trainer(whole, KeepMasks(), enable_checkpointing=False).fit(straight, data(2))
    checkpoint = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_epochs=stop, save_top_k=-1)
    trainer(wanda(schedule), KeepMasks(), checkpoint).fit(lit(), data(2))
    module, prune = lit(), wanda(schedule)
    path = str(tmp_path / f"at-step={stop}.ckpt")
    trainer(prune, KeepMasks(), enable_checkpointing=False).fit(module, data(2), ckpt_path=path, weights_only=True)
    assert whole.report is not None and prune.report is not None
    for name, mask in whole.report.masks.items():
        assert torch.equal(mask.unpack(), prune.report.masks[name].unpack())
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value)


def test_a_schedule_that_outlasts_the_training_is_refused() -> None:
    with pytest.raises(InputError, match="prunes until step 9, and training ends after 8 optimizer steps"):
        trainer(wanda(OneShot(9)), enable_checkpointing=False).fit(lit(), data())


def test_data_without_a_calibration_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"the data module is .*: pruning needs one with calibration_batches\(\)"):
        trainer(wanda(), enable_checkpointing=False).fit(lit(), data().train_dataloader())


def test_exactly_one_prune_callback_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 0 Prune callbacks"):
        trainer(Export(str(tmp_path / "out")), enable_checkpointing=False).fit(lit(), data())


@pytest.mark.parametrize("callback", [wanda(), KeepMasks()])
def test_several_processes_are_refused(callback: Callback) -> None:
    class TwoProcesses:
        world_size = 2
        max_steps = 8

    with pytest.raises(InputError, match=r"2 processes: .* --trainer\.devices 1"):
        callback.setup(TwoProcesses(), lit(), "fit")  # type: ignore[arg-type]
