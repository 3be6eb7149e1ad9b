"""Recovery of a pruned model as a person runs it: every path keeps the zeros and exports a plain model."""

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, SequentialLR

from lit_prune.callbacks import Export, FindLearningRate, KeepMasks, Prune, StopOnDivergence, ValidateAtStart
from lit_prune.callbacks.stop_on_divergence import DivergedError
from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.lora import merged
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import Unstructured
from lit_prune.pruning import Cubic, PruningPlan
from lit_prune.scorers import Magnitude
from lit_prune.training import (
    Distillation,
    Everything,
    LitCausalLM,
    LoRA,
    NormsAndBiases,
    TextDataModule,
    Trainable,
    WarmupCosine,
)
from lit_prune.training.strategies import FSDP2
from support.rounding import distance, network
from support.training import trainer as quiet_trainer

trainer = partial(quiet_trainer, max_steps=8, limit_val_batches=2, val_check_interval=4, check_val_every_n_epoch=None)
UP = "model.layers.0.mlp.up_proj.weight"
TRAINABLE = {"everything": Everything, "norms": NormsAndBiases, "lora": lambda: LoRA(4, norms_and_biases=True)}


@pytest.fixture(params=["llama"])
def dense(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> str:
    save_pruned(tmp_path / "dense", tiny_model(request.param), load_tokenizer("random"), {}, {})
    return str(tmp_path / "dense")


def data(windows: int = 64) -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=16, sequences=4, max_windows=windows, batch_size=2)


def lit(model: str, trainable: Trainable | None = None, lr: float = 1e-2, **options: Any) -> LitCausalLM:
    torch.manual_seed(0)
    return LitCausalLM(
        model, trainable=trainable, optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.1), **options
    )


def magnitude(schedule: Cubic | None = None) -> Prune:
    return Prune(PruningPlan(Unstructured(0.5), Magnitude()), schedule)


@pytest.mark.parametrize("dense", ["gpt2"], indirect=True)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_every_path_keeps_zeros_and_exports_what_was_trained(trainable: str, dense: str, tmp_path: Path) -> None:
    module = lit(
        dense,
        TRAINABLE[trainable](),
        loss=Distillation(dense, hidden=1.0, dtype="float32"),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 2),
        gradient_checkpointing=True,
    )
    prune, out = magnitude(), tmp_path / "out"
    runner = trainer(prune, KeepMasks(), Export(str(out)), accumulate_grad_batches=2)
    runner.fit(module, data())
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)  # the schedule ended with it
    exported = load_model(str(out))
    assert prune.report is not None
    check_masks_hold(exported, prune.report.masks)
    with merged(module.model):
        assert all(torch.equal(v, exported.state_dict()[n]) for n, v in module.model.state_dict().items())
        check_masks_hold(module.model, prune.report.masks)
    module.eval()
    input_ids = torch.arange(16)[None]
    assert distance(module(input_ids), exported(input_ids).logits) <= network(exported)
    before = load_model(dense)
    changed = {
        n for n, v in exported.named_parameters() if v.dim() == 1 and not torch.equal(v, before.get_parameter(n))
    }
    assert changed


def test_plain_adapters_train_beside_weights_that_stay_sparse(dense: str, tmp_path: Path) -> None:
    module, prune = lit(dense, LoRA(4, masked=False)), magnitude()
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(module, data())
    assert prune.report is not None
    exported = load_model(str(tmp_path / "out"))
    check_masks_hold(exported, prune.report.masks)
    module.eval()
    input_ids = torch.arange(16)[None]
    assert (module(input_ids) - exported(input_ids).logits).abs().max() > 1e-3
    assert 'PeftModel.from_pretrained(model, "FOLDER/adapter")' in (tmp_path / "out" / "README.md").read_text()
    with pytest.warns(UserWarning, match="whose plain adapters are not put on"):
        lit(str(tmp_path / "out")).configure_model()
    both = PeftModel.from_pretrained(exported, tmp_path / "out" / "adapter")
    assert distance(module(input_ids), both(input_ids).logits) <= network(exported)


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_weights_in_half_precision_are_warned_of(
    dtype: Any, warned: bool, dense: str, recwarn: pytest.WarningsRecorder
) -> None:
    trainer(magnitude(), KeepMasks(), max_steps=1, precision="bf16-mixed").fit(lit(dense, dtype=dtype), data())
    assert any("steps much smaller than a weight are rounded away" in str(w.message) for w in recwarn) == warned


def test_a_checkpoint_holds_adapters_and_no_teacher(dense: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=4, save_top_k=-1)
    module = lit(dense, LoRA(2), loss=Distillation(dense, dtype="float32"))
    trainer(magnitude(), KeepMasks(), checkpoint, max_steps=4).fit(module, data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    of_model = {f"model.{name}" for name in module.model.state_dict()}
    assert set(saved["state_dict"]) == of_model
    assert len(saved["optimizer_states"][0]["state"]) == 2 * 3 * 7  # A and B of seven layers in three blocks
    again = lit(dense, LoRA(2), loss=Distillation(dense, dtype="float32"))
    path = str(tmp_path / "last.ckpt")
    trainer(magnitude(), KeepMasks()).fit(again, data(), ckpt_path=path, weights_only=True)
    straight = lit(dense, LoRA(2), loss=Distillation(dense, dtype="float32"))
    trainer(magnitude(), KeepMasks()).fit(straight, data())
    for name, value in straight.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_model_that_was_pruned_before_is_recovered_and_keeps_its_report(dense: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trainer(magnitude(), KeepMasks(), Export(str(first)), max_steps=1).fit(lit(dense), data())
    report = json.loads((first / "pruning.json").read_text())
    report["evaluation"] = {"perplexity_before": 1.0, "perplexity_after": 2.0, "seqlen": 16, "text": "of the first"}
    report["samples"] = [{"prompt": "A", "before": "A b", "after": "A c"}]
    (first / "pruning.json").write_text(json.dumps(report))
    text = data()
    text.other_val = ["embedded"]
    trainer(KeepMasks(str(first)), Export(str(second))).fit(lit(str(first), LoRA(2)), text)
    masks = load_masks(first)
    check_masks_hold(load_model(str(second)), masks)
    assert load_masks(second).keys() == masks.keys()
    report = json.loads((second / "pruning.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["evaluation"] == {} and report["samples"] == []  # they were of the weights before
    assert "of the first" not in (second / "README.md").read_text()
    curves = report["validation"]
    assert curves["validation text"] == curves["embedded"]  # the same text twice, to see that both are measured
    assert [step for step, _ in curves["embedded"]] == [4, 8] and (second / "validation.png").is_file()
    third = tmp_path / "third"
    trainer(KeepMasks("zeros"), Export(str(third))).fit(lit(str(first)), data())
    check_masks_hold(load_model(str(third)), masks)
    assert not (third / "pruning.json").exists()  # zeros say nothing of how they came about


def test_masks_of_another_model_are_refused(dense: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    trainer(magnitude(), KeepMasks(), Export(str(first)), max_steps=1).fit(lit(dense), data())
    other = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(InputError, match=r"masks are for another model: it has no model\.layers\.0\."):
        trainer(KeepMasks(str(first))).fit(LitCausalLM("random", config=other), data())


class Spoil(Callback):
    """Makes the model worse and worse after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step > self.after:
            module.model.lm_head.weight.data.mul_(10.0)


def best(tmp_path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(tmp_path / "checkpoints", monitor="val/perplexity", filename="{step}")


def test_the_best_model_is_exported(dense: str, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", best(tmp_path)
    early = EarlyStopping("val/perplexity", patience=1)
    runner = trainer(magnitude(), KeepMasks(), Spoil(4), checkpoint, early, Export(str(out), best=True), max_steps=40)
    runner.fit(lit(dense, LoRA(2)), data(200))
    assert runner.global_step < 40  # stopped early
    assert checkpoint.best_model_path.endswith("step=4.ckpt")
    module = lit(str(out))
    perplexity = trainer().validate(module, data(200), verbose=False)[0]["val/perplexity"]
    # Merged adapters round in another way; the logarithm of the perplexity is about as large as logits are.
    rounding = network(module.model) * math.log(perplexity)
    assert perplexity == pytest.approx(checkpoint.best_model_score.item(), rel=rounding)


def test_a_training_that_stops_before_its_last_pruning_says_so(dense: str, tmp_path: Path) -> None:
    # Spoiled at step 4, the model is worse at the validation there: no patience is left, and the pruning at step 20
    # never comes.
    early = EarlyStopping("val/perplexity", patience=1)
    callbacks = [magnitude(Cubic(start=0, end=20, every=20, initial=0.2)), KeepMasks(), Spoil(3), early]
    with pytest.warns(
        UserWarning, match=r"stopped at step 4, before .* \(step 20\): the model has 20\.0% sparsity, not 50"
    ):
        trainer(*callbacks, max_steps=40, val_check_interval=1).fit(lit(dense), data(200))


def test_a_pruning_begins_the_patience_anew(dense: str) -> None:
    class Scores(Callback):
        """Logs a score that is worse at every validation: the step."""

        def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
            module.log("score", float(trainer.global_step))

    early = EarlyStopping("score", patience=3)
    runner = trainer(
        Scores(), magnitude(Cubic(start=0, end=3, every=3)), KeepMasks(), early, max_steps=40, val_check_interval=1
    )
    runner.fit(lit(dense), data(200))
    # The best is that of step 1, and that of step 3 once the pruning there is done; three worse ones follow.
    assert runner.global_step == 6 and early.best_score.item() == 3


def test_the_course_of_a_training_begins_before_it(dense: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trainer(magnitude(), KeepMasks(), Export(str(first)), max_steps=1).fit(lit(dense), data())
    pruned = trainer().validate(lit(str(first)), data(), verbose=False)[0]["val/perplexity"]
    runner = trainer(KeepMasks(str(first)), ValidateAtStart(), best(tmp_path), Export(str(second), best=True))
    runner.fit(lit(str(first)), data())
    course = json.loads((second / "pruning.json").read_text())["validation"]["validation text"]
    assert [step for step, _ in course] == [0, 4, 8]
    assert course[0][1] == pytest.approx(pruned)
    assert runner.global_step == 8 and course[-1][1] < pruned
    straight = lit(str(first))
    trainer(KeepMasks(str(first))).fit(straight, data())
    again = lit(str(first))
    trainer(KeepMasks(str(first)), ValidateAtStart()).fit(again, data())
    assert torch.equal(again.model.get_parameter(UP), straight.model.get_parameter(UP))  # it changes nothing
    with pytest.raises(InputError, match="ValidateAtStart has nothing to do"):
        trainer(KeepMasks(str(first)), ValidateAtStart(), limit_val_batches=0).fit(lit(str(first)), data())


def test_the_best_model_is_one_with_the_last_masks(dense: str, tmp_path: Path) -> None:
    # The last pruning is at step 6, so the checkpoint of step 4, better or not, is not what is asked for.
    out, checkpoint = tmp_path / "out", best(tmp_path)
    prune = magnitude(Cubic(start=0, end=6, every=3))
    trainer(prune, KeepMasks(), Spoil(6), checkpoint, Export(str(out), best=True)).fit(lit(dense), data())
    assert checkpoint.best_model_path.endswith("step=8.ckpt")
    assert prune.report is not None
    check_masks_hold(load_model(str(out)), prune.report.masks)


def test_the_best_model_needs_to_be_known(dense: str, tmp_path: Path) -> None:
    export = Export(str(tmp_path / "out"), best=True)
    with pytest.raises(InputError, match="has 0 ModelCheckpoints with a monitor"):
        trainer(magnitude(), KeepMasks(), export).fit(lit(dense), data())

    class Sharded:
        strategy = FSDP2()
        callbacks: ClassVar = [magnitude(), ModelCheckpoint(monitor="val/perplexity", save_weights_only=True)]

    with pytest.raises(InputError, match="FSDP2 cannot load the best checkpoint without its optimizer"):
        export.setup(Sharded(), lit(dense), "fit")  # type: ignore[arg-type]


def test_without_a_best_model_the_last_one_is_exported(dense: str, tmp_path: Path) -> None:
    out, module = tmp_path / "out", lit(dense)
    runner = trainer(magnitude(), KeepMasks(), best(tmp_path), Export(str(out), best=True), val_check_interval=20)
    with pytest.warns(UserWarning, match="no checkpoint was written since the last pruning: the last weights"):
        runner.fit(module, data())
    check_masks_hold(load_model(str(out)), load_masks(out))
    assert torch.equal(load_model(str(out)).state_dict()[UP], module.model.get_parameter(UP))


@pytest.mark.parametrize("how", ["nan", "rate"])
def test_a_divergence_is_stopped_in_words_and_the_best_model_kept(how: str, dense: str, tmp_path: Path) -> None:
    class ToNan(Spoil):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step > self.after:
                module.model.lm_head.weight.data.fill_(float("nan"))

    out, checkpoint = tmp_path / "out", best(tmp_path)
    spoil = ToNan(5) if how == "nan" else Spoil(5)
    callbacks = [magnitude(), KeepMasks(), StopOnDivergence(window=2), spoil, checkpoint, Export(str(out), best=True)]
    message = r"training diverged at step \d+: the loss is .* at the learning rate 0\.01: lower it.* is kept: .*step=4"
    with pytest.raises(DivergedError, match=message):
        trainer(*callbacks, max_steps=40).fit(lit(dense), data(200))
    check_masks_hold(load_model(str(out)), load_masks(out))
    assert all(value.isfinite().all() for value in load_model(str(out)).parameters())


def test_a_training_that_does_not_diverge_goes_on(dense: str) -> None:
    runner = trainer(magnitude(Cubic(start=0, end=6, every=3)), KeepMasks(), StopOnDivergence(1.5, window=1))
    runner.fit(lit(dense), data())
    assert runner.global_step == 8


def test_a_scaled_loss_that_grows_with_its_scale_does_not_diverge(dense: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)  # twice as large after every step
    runner = trainer(
        magnitude(), KeepMasks(), StopOnDivergence(1.5, window=1), plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    runner.fit(lit(dense), data())
    assert runner.global_step == 8 and scaler.get_scale() > 1024


@pytest.mark.parametrize(("factor", "window"), [(1.0, 20), (3.0, 0)])
def test_a_divergence_that_cannot_be_seen_is_refused(factor: float, window: int) -> None:
    with pytest.raises(InputError, match="it must be"):
        StopOnDivergence(factor, window)


def test_a_range_test_finds_the_rate_and_leaves_no_trace(dense: str, caplog: pytest.LogCaptureFixture) -> None:
    class Watch(Callback):
        """Sees the weights and the rate of the first real step."""

        def on_train_batch_start(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                self.weights = {n: p.detach().clone() for n, p in module.model.named_parameters()}
                self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    prune, find, watch = magnitude(), FindLearningRate(1e-5, 1e-1, 20), Watch()
    module = lit(dense, lr=7e-7, lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 2))
    with caplog.at_level(logging.INFO):
        runner = trainer(prune, KeepMasks(), find, watch)
        runner.fit(module, data(200))
    assert runner.global_step == 8
    assert find.found is not None and 1e-5 <= find.found <= 1e-1
    assert watch.rate == pytest.approx(find.found / 2)  # the first of two steps of warm-up
    assert prune.report is not None
    for name, weight in load_model(dense).named_parameters():
        keep = prune.report.masks[name].unpack() if name in prune.report.masks else True
        assert torch.equal(watch.weights[name], weight * keep)  # magnitude pruning leaves the rest as it is
    check_masks_hold(module.model, prune.report.masks)


def test_bad_range_tests_are_refused(dense: str) -> None:
    class Sharded(DeepSpeedStrategy):
        def __init__(self) -> None: ...

    class Run:
        strategy = Sharded()

    with pytest.raises(InputError, match="Sharded: FindLearningRate works on one device and with ddp"):
        FindLearningRate().setup(Run(), lit("random"), "fit")  # type: ignore[arg-type]
    fixed = {
        "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=8),
        "SequentialLR": lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), ConstantLR(optimizer)], [4]),
    }
    for name, schedule in fixed.items():
        with pytest.raises(InputError, match=f"{name}, whose rates FindLearningRate cannot scale: use .*WarmupCosine"):
            trainer(magnitude(), KeepMasks(), FindLearningRate()).fit(lit(dense, lr_scheduler=schedule), data())
    with pytest.raises(InputError, match="0 < lowest < highest"):
        FindLearningRate(1e-2, 1e-3)
    with pytest.raises(InputError, match="steps is 5"):
        FindLearningRate(steps=5)


def test_adapters_and_a_later_pruning_are_refused(dense: str) -> None:
    with pytest.raises(InputError, match="prunes until step 6, and adapters are trained"):
        trainer(magnitude(Cubic(start=0, end=6, every=3)), KeepMasks()).fit(lit(dense, LoRA(2)), data())


def test_a_resumed_training_remembers_how_low_the_loss_has_been() -> None:
    before, after = StopOnDivergence(window=2), StopOnDivergence(window=2)
    before._losses.extend([1.0, 2.0])
    before._lowest = 1.5
    after.load_state_dict(before.state_dict())
    assert list(after._losses) == [1.0, 2.0] and after._lowest == 1.5 and after._losses.maxlen == 2
