"""Masks under every optimizer of torch and under averages of weights; what a resumed training may not change."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from lit_prune.callbacks import Export, KeepMasks, Prune, ValidateAtStart
from lit_prune.checkpoint.files import load_tensors
from lit_prune.checkpoint.training_checkpoints import read_checkpoint
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.lora import adapted_layers, unmasked_adapter
from lit_prune.ops import Unstructured
from lit_prune.pruning import OneShot, PruningPlan
from lit_prune.scorers import Magnitude
from lit_prune.sharding.parameters import count_revived
from lit_prune.trainer import PruningTrainer
from lit_prune.training import LitCausalLM, TextDataModule, WarmupCosine
from lit_prune.training.recovery import LoRA
from lit_prune.training.strategies import FSDP2
from support.training import SMALLER, trainer

UP = "model.layers.0.mlp.up_proj.weight"
MIXING = {"Muon"}
"""Optimizers that mix the elements of a matrix, so that a weight without a gradient moves."""
NOT_FOR_THIS = {"SparseAdam", "LBFGS", "Optimizer"}
"""SparseAdam wants sparse gradients; LBFGS calls the model again within a step."""
OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in NOT_FOR_THIS
)


def plan(sparsity: float = 0.5) -> PruningPlan:
    return PruningPlan(Unstructured(sparsity), Magnitude(), output_error=False)


def fit(
    *callbacks: Callback, optimizer: Any = None, steps: int = 4, resume: Path | None = None, **options: Any
) -> tuple[Trainer, LitCausalLM]:
    torch.manual_seed(0)
    pretrained = options.pop("pretrained", "random")
    own = {name: options.pop(name) for name in ("trainable", "lr_scheduler") if name in options}
    own["config"] = SMALLER if pretrained == "random" else None
    own["optimizer"] = optimizer or partial(torch.optim.AdamW, lr=1e-2)
    module = options.pop("module", None) or LitCausalLM(pretrained, **own)
    data = TextDataModule("random", dataset="embedded", seqlen=16, sequences=2, max_windows=32, batch_size=2)
    runner = trainer(*callbacks, max_steps=steps, **{"limit_val_batches": 1, "val_check_interval": 2, **options})
    runner.fit(module, datamodule=data, ckpt_path=resume)
    return runner, module


def optimizer_of(name: str) -> Any:
    cls = getattr(torch.optim, name)
    known = inspect.signature(cls).parameters
    wanted = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    if name == "Muon":  # for matrices alone
        return lambda parameters: cls([p for p in parameters if p.dim() == 2], lr=1e-2)
    return partial(cls, **{key: value for key, value in wanted.items() if key in known})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_under_every_optimizer_of_torch_or_training_stops(name: str) -> None:
    keep_masks = KeepMasks()
    run = partial(fit, Prune(plan()), keep_masks, optimizer=optimizer_of(name))
    if name in MIXING:
        with pytest.raises(RuntimeError, match=r"pruned weights are not zero.*the masks no longer hold"):
            run()
        return
    trainer, module = run()
    for parameter, mask in keep_masks.masks.items():
        weight = module.model.get_parameter(parameter)
        assert not any(count_revived(weight, mask.unpack(), trainer.optimizers[0]).values())
        assert weight[~mask.unpack()].count_nonzero() == 0


def test_a_moment_that_could_move_a_pruned_weight_fails_the_audit() -> None:
    keep_masks = KeepMasks()
    trainer, module = fit(Prune(plan()), keep_masks)
    weight, keep = module.model.get_parameter(UP), keep_masks.masks[UP].unpack()
    keep_masks.audit(trainer, module)
    trainer.optimizers[0].state[weight]["exp_avg"][~keep] = 1e-3
    with pytest.raises(RuntimeError, match=rf"{UP}: \d+ pruned weights are not zero in its exp_avg"):
        keep_masks.audit(trainer, module)


@pytest.mark.parametrize("first", [True, False])
def test_averages_do_not_bring_pruned_weights_back(first: bool, tmp_path: Path) -> None:
    keep_masks, average = KeepMasks(), EMAWeightAveraging(decay=0.9)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    mine = [Prune(plan(), OneShot(2)), keep_masks]
    callbacks = [average, *mine] if first else [*mine, average]
    _, module = fit(*callbacks, checkpoint, steps=-1, max_epochs=3, limit_train_batches=2)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    for parameter, mask in keep_masks.masks.items():
        for weight in (module.model.get_parameter(parameter), saved[f"model.{parameter}"]):
            assert weight[~mask.unpack()].count_nonzero() == 0
            assert weight[mask.unpack()].count_nonzero() > 0


def test_an_average_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="use WeightAveraging or EMAWeightAveraging"):
        fit(Prune(plan()), KeepMasks(), StochasticWeightAveraging(1e-2))


class Reviver(Callback):
    """Brings a pruned weight back when training ends, as callbacks that average weights do."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.model.get_parameter(UP).data.fill_(1.0)


def test_the_last_callback_is_audited_too() -> None:
    with pytest.raises(RuntimeError, match="the masks no longer hold"):
        fit(Prune(plan()), KeepMasks(), Reviver())


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    checkpoint = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2, save_top_k=-1)
    fit(Prune(plan()), KeepMasks(), checkpoint, steps=2)
    return tmp_path / "half.ckpt"


def test_another_plan_or_schedule_is_refused_when_training_goes_on(halfway: Path) -> None:
    fit(Prune(plan()), KeepMasks(), resume=halfway)
    with pytest.raises(InputError, match=r"plan\.pattern.*sparsity was 0\.5 and is now 0\.8; give the plan"):
        fit(Prune(plan(0.8)), KeepMasks(), resume=halfway)
    with pytest.raises(InputError, match=r"schedule was 'OneShot\(step=0\)' and is now 'OneShot\(step=3\)'"):
        fit(Prune(plan(), OneShot(3)), KeepMasks(), resume=halfway)


def test_another_optimizer_is_refused_when_training_goes_on(halfway: Path) -> None:
    with pytest.raises(InputError, match=r"model\.optimizer was 'AdamW' and is now 'SGD'"):
        fit(Prune(plan()), KeepMasks(), resume=halfway, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))


@pytest.mark.parametrize(("name", "value"), [("optimizer_states", []), ("lr_schedulers", [{"last_epoch": 3}])])
def test_states_of_nothing_are_refused_when_training_goes_on(name: str, value: Any, halfway: Path) -> None:
    torch.save({**torch.load(halfway, weights_only=True), name: value}, halfway)
    with pytest.raises(InputError, match=f"cannot resume from this checkpoint: it holds no {name}, .* or is damaged"):
        fit(Prune(plan()), KeepMasks(), resume=halfway)


def test_weights_of_another_kind_are_refused(halfway: Path) -> None:
    content = torch.load(halfway, weights_only=True)
    content["state_dict"][f"model.{UP}"] = content["state_dict"][f"model.{UP}"].to(torch.int8)
    torch.save(content, halfway)
    with pytest.raises(InputError, match=r"the checkpoint holds .*up_proj\.weight as torch\.int8, and the model as"):
        fit(Prune(plan()), KeepMasks(), resume=halfway)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_a_learning_rate_that_means_nothing_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"model\.optimizer"):
        fit(optimizer=partial(torch.optim.AdamW, lr=rate))


def test_the_start_is_the_best_if_training_only_does_harm(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/perplexity")
    callbacks = [Prune(plan()), KeepMasks(), ValidateAtStart(), best, Export(str(tmp_path / "out"), best=True)]
    harm = partial(torch.optim.SGD, lr=100.0)
    fit(*callbacks, optimizer=harm)
    assert best.best_model_path.endswith("step=0.ckpt")
    start = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    exported = load_model(str(tmp_path / "out")).state_dict()
    assert torch.equal(exported[UP], start[f"model.{UP}"])
    assert exported[UP].count_nonzero() > 0


def test_the_average_of_a_masked_adapter_keeps_its_mask() -> None:
    keep_masks = KeepMasks()
    _, module = fit(
        EMAWeightAveraging(decay=0.9), Prune(plan()), keep_masks, trainable=LoRA(rank=2), limit_train_batches=2
    )
    layers = adapted_layers(module.model)
    assert layers and not unmasked_adapter(module.model, keep_masks.masks)


@pytest.mark.parametrize("last", [True, False])
def test_the_best_model_is_exported_and_not_the_last_average(last: bool, tmp_path: Path) -> None:
    best, average = ModelCheckpoint(tmp_path, monitor="val/perplexity"), EMAWeightAveraging(decay=0.5)
    mine = [Prune(plan()), KeepMasks(), Export(str(tmp_path / "out"), best=True)]
    callbacks = [*mine, average] if last else [average, *mine]
    harm = partial(torch.optim.SGD, lr=3.0)
    trainer, _ = fit(*callbacks, best, optimizer=harm, steps=6)
    content = torch.load(best.best_model_path, weights_only=True)
    assert content["global_step"] < trainer.global_step
    assert torch.equal(load_model(str(tmp_path / "out")).state_dict()[UP], content["state_dict"][f"model.{UP}"])


@pytest.mark.parametrize("options", [{"val_check_interval": 1.0, "limit_train_batches": 4}, {"every": 2}], ids=str)
def test_the_start_is_kept_whenever_checkpoints_are_written(options: dict[str, Any], tmp_path: Path) -> None:
    every = options.pop("every", None)
    best = ModelCheckpoint(tmp_path, monitor="val/perplexity", every_n_train_steps=every)
    fit(ValidateAtStart(), best, optimizer=partial(torch.optim.SGD, lr=100.0), **options)
    assert best.best_model_path.endswith("step=0.ckpt")


class FirstStep(Callback):
    """Notes how many steps the optimizer has counted after the first."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.counted = float(next(iter(trainer.optimizers[0].state.values()))["step"])


def test_a_sharded_start_is_kept_and_exported_and_counts_for_no_step(tmp_path: Path) -> None:
    best, first = ModelCheckpoint(tmp_path / "kept", monitor="val/perplexity"), FirstStep()
    callbacks = [Prune(plan()), KeepMasks(), ValidateAtStart(), best, first, Export(str(tmp_path / "out"), best=True)]
    harm = partial(torch.optim.AdamW, lr=10.0)
    try:
        fit(*callbacks, optimizer=harm, strategy=FSDP2(), devices=1)
    finally:
        torch.distributed.destroy_process_group()
    assert best.best_model_path.endswith("step=0.ckpt") and first.counted == 1
    start = read_checkpoint(best.best_model_path).weights
    assert torch.equal(load_model(str(tmp_path / "out")).state_dict()[UP], start[UP])


def test_another_schedule_is_refused_when_training_goes_on(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2, save_top_k=-1)
    fit(checkpoint, steps=2, lr_scheduler=WarmupCosine)
    with pytest.raises(
        InputError, match=r"model\.lr_scheduler was 'WarmupCosine' and is now None; use the settings it"
    ):
        fit(resume=tmp_path / "half.ckpt")


def test_other_masks_are_refused_when_training_goes_on(tmp_path: Path) -> None:
    folders = [str(tmp_path / "half"), str(tmp_path / "more")]
    for folder, sparsity in zip(folders, (0.5, 0.8), strict=True):
        fit(Prune(plan(sparsity)), KeepMasks(), Export(folder), steps=1)
    checkpoint = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=2, save_top_k=-1)
    fit(KeepMasks(folders[0]), checkpoint, pretrained=folders[0], steps=2)
    fit(KeepMasks(folders[0]), pretrained=folders[0], resume=tmp_path / "saved.ckpt")
    with pytest.raises(InputError, match=r"another mask of .* than that of KeepMasks\.masks"):
        fit(KeepMasks(folders[1]), pretrained=folders[1], resume=tmp_path / "saved.ckpt")


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [Prune(plan()), Prune(plan(0.8))], r"trainer\.callbacks has 2 of Prune: keep one"),
        (lambda: [KeepMasks(), KeepMasks()], r"trainer\.callbacks has 2 of KeepMasks"),
        (lambda: [Export("a"), Export("b")], r"trainer\.callbacks has 2 of Export"),
        (lambda: [EMAWeightAveraging(decay=0.9)], r"strategy is FSDP2: averages need whole weights"),
    ],
)
def test_callbacks_that_cannot_work_together_are_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruningTrainer(accelerator="cpu", logger=False, strategy=FSDP2(), callbacks=callbacks())


def test_a_model_in_half_precision_keeps_the_precision_of_its_buffers(tmp_path: Path) -> None:
    module = LitCausalLM("random", "bfloat16", config=SMALLER)
    module.configure_model()
    module.model.register_buffer("bias_of_a_router", torch.tensor([1.001]))  # rounds to 1 in bfloat16
    fit(Prune(plan()), KeepMasks(), Export(str(tmp_path / "out")), module=module, steps=1)
    assert load_tensors(tmp_path / "out" / "model.safetensors")["bias_of_a_router"].item() == pytest.approx(1.001)


def test_a_training_that_diverges_is_exported_all_the_same(tmp_path: Path) -> None:
    class Diverged(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            export.validation = {"validation text": [(0, 3.0), (1, 1e300), (2, float("inf"))]}

    export = Export(str(tmp_path / "out"))
    fit(Prune(plan()), KeepMasks(), export, Diverged())
    assert (tmp_path / "out" / "report.html").is_file()
