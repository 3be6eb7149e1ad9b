"""Pruning while training, keeping masks and exporting, on one device."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.allocators import AlphaPruning
from lit_prune.callbacks import Export, KeepMasks, Prune
from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.ops import NM, Unstructured
from lit_prune.pruning import Cubic, OneShot, PruningPlan, PruningReport, Schedule
from lit_prune.scorers import Magnitude, Wanda
from lit_prune.solvers import ADMM
from lit_prune.solvers.base import Solver
from lit_prune.training import LitCausalLM, TextDataModule
from support.training import LLAMA
from support.training import trainer as quiet_trainer

trainer = partial(quiet_trainer, max_steps=8, limit_val_batches=2)
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, weight_decay=0.1),
}


def data(windows: int = 64) -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=16, sequences=4, max_windows=windows, batch_size=2)


def lit(optimizer: str = "adamw") -> LitCausalLM:
    torch.manual_seed(0)
    return LitCausalLM("random", config=LLAMA, optimizer=OPTIMIZERS[optimizer])


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
    trainer(prune, KeepMasks(), history, **options).fit(module, data())
    expected = {0: 0.0, 1: 0.0, 2: 0.2, 3: 0.2, 4: 0.55, 5: 0.55, 6: 0.6, 7: 0.6, 8: 0.6}
    assert history.sparsity == pytest.approx({k: expected[k] for k in history.sparsity}, abs=0.01)
    assert prune.report is not None
    check_masks_hold(module.model, prune.report.masks)


def test_without_keep_masks_weights_come_back_and_export_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"_proj\.weight: \d+ pruned weights are not zero"):
        trainer(wanda(), Export(str(tmp_path / "out"))).fit(lit(), data())
    assert not (tmp_path / "out").exists()


def test_the_audit_names_a_revived_weight() -> None:
    class Revive(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            module.model.model.layers[1].mlp.up_proj.weight.data.add_(1.0)

    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: "):
        trainer(wanda(), KeepMasks(), Revive()).fit(lit(), data())


def test_kept_weights_train(tmp_path: Path) -> None:
    module = lit()
    module.configure_model()
    before = module.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    prune = wanda()
    trainer(prune, KeepMasks()).fit(module, data())
    assert prune.report is not None
    keep = prune.report.masks["model.layers.0.mlp.up_proj.weight"].unpack()
    after = module.model.model.layers[0].mlp.up_proj.weight
    assert (after[keep] != before[keep]).all() and (after[~keep] == 0).all()


def test_export_writes_a_folder_with_verified_masks(tmp_path: Path) -> None:
    prune = Prune(PruningPlan(NM(2, 4), Magnitude()), OneShot(3))
    module = lit()
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(module, data())
    loaded = load_model(str(tmp_path / "out"))
    check_masks_hold(loaded, load_masks(tmp_path / "out"))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in module.model.state_dict().items())
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(InputError, match="it exists and is kept"):
        trainer(prune, Export(str(tmp_path / "out"))).fit(lit(), data())


class Losses(Callback):
    """Records the loss of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_resumed_run_equals_one_without_a_stop(tmp_path: Path, stop: int) -> None:
    # Epochs of five batches, two batches per step: stops in the middle of an epoch, just after a pruning (4), and
    # between two of them.
    schedule = Cubic(start=2, end=6, every=2)
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    checkpoint = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=stop, save_top_k=-1)
    straight, whole, losses = lit(), wanda(schedule), Losses()
    trainer(whole, KeepMasks(), losses, checkpoint, **options).fit(straight, data(10))
    module, prune, resumed = lit(), wanda(schedule), Losses()
    path = str(tmp_path / f"at-step={stop}.ckpt")
    quiet = trainer(prune, KeepMasks(), resumed, **options)
    quiet.fit(module, data(10), ckpt_path=path, weights_only=True)
    assert resumed.losses and resumed.losses == losses.losses[-len(resumed.losses) :]
    assert whole.report is not None and prune.report is not None
    for name, mask in whole.report.masks.items():
        assert torch.equal(mask.unpack(), prune.report.masks[name].unpack())
    for name, value in straight.model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value)


class Reports(Callback):
    """Records what every pruning did."""

    def __init__(self) -> None:
        self.reports: list[PruningReport] = []

    def on_pruned(self, trainer: Trainer, module: Any, report: PruningReport) -> None:
        self.reports.append(report)


def gradual(solver: Solver | None = None, **options: Any) -> list[PruningReport]:
    """Prune three times under an allocation that depends on the weights, with training in between."""
    seen = Reports()
    parts: dict[str, Any] = {"solver": solver} if solver else {"scorer": Magnitude()}
    plan = PruningPlan(Unstructured(0.6), allocator=AlphaPruning(epsilon=0.3), **parts)
    prune = Prune(plan, Cubic(start=0, end=6, every=3, initial=0.2), **options)
    trainer(prune, KeepMasks(), seen).fit(lit(), data())
    assert [round(report.sparsity, 2) for report in seen.reports] == [0.2, 0.55, 0.6]
    layers = seen.reports[-1].layers
    asked = 0.6 * sum(layer.numel for layer in layers)
    assert abs(sum(int((~layer.mask.unpack()).sum()) for layer in layers) - asked) <= len(layers)
    return seen.reports


def test_a_frozen_allocation_is_the_dense_models() -> None:
    first, *others = gradual()
    assert len({round(value, 3) for value in first.allocation.values()}) > 1
    assert all(report.allocation == first.allocation for report in others)


def test_a_recomputed_allocation_follows_the_weights() -> None:
    first, *_, last = gradual(allocation="recomputed")
    scaled = {name: value * 0.6 / 0.2 for name, value in first.allocation.items()}
    assert any(abs(last.allocation[name] - scaled[name]) > 1e-3 for name in scaled)


def test_without_regrowth_masks_are_nested_and_with_it_weights_come_back() -> None:
    def regrown(reports: list[PruningReport]) -> int:
        return sum(
            int((later.masks[name].unpack() & ~mask.unpack()).sum())
            for earlier, later in pairwise(reports)
            for name, mask in earlier.masks.items()
        )

    # ADMM gives a weight that was pruned a new value, where that helps the others.
    assert regrown(gradual(ADMM(iterations=6), regrowth=False)) == 0
    assert regrown(gradual(ADMM(iterations=6))) > 0


def test_regrowth_off_needs_a_frozen_allocation() -> None:
    with pytest.raises(InputError, match="regrowth is off and allocation is 'recomputed'"):
        Prune(PruningPlan(Unstructured(0.5), Magnitude()), allocation="recomputed", regrowth=False)
    with pytest.raises(InputError, match="allocation is 'thawed'"):
        Prune(PruningPlan(Unstructured(0.5), Magnitude()), allocation="thawed")  # type: ignore[arg-type]


def test_a_schedule_that_outlasts_the_training_is_refused() -> None:
    with pytest.raises(InputError, match="prunes until step 9, and training ends after 8 optimizer steps"):
        trainer(wanda(OneShot(9))).fit(lit(), data())


def test_data_without_a_calibration_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"the data module is .*: pruning needs one with calibration_batches\(\)"):
        trainer(wanda()).fit(lit(), data().train_dataloader())


def test_exactly_one_prune_callback_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 0 Prune callbacks"):
        trainer(Export(str(tmp_path / "out"))).fit(lit(), data())
