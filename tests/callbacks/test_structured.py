"""Structured pruning in training: masks first, and a smaller model at the end."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_prune.allocators import Measured
from lit_prune.callbacks import Export, KeepMasks, Prune
from lit_prune.cli import main
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.ops import Structured
from lit_prune.pruning import Cubic, OneShot, PruningPlan, Reconstruction, Schedule
from lit_prune.scorers import Wanda
from lit_prune.solvers import SparseGPT
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.recovery import LoRA
from support.rounding import distance, network
from support.training import LLAMA
from support.training import trainer as quiet_trainer

trainer = partial(quiet_trainer, max_steps=8, limit_val_batches=2)


def data() -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=16, sequences=4, max_windows=64, batch_size=2)


def lit() -> LitCausalLM:
    torch.manual_seed(0)
    return LitCausalLM("random", config=LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))


@pytest.mark.parametrize("schedule", [OneShot(), Cubic(start=0, end=6, every=2)])
@pytest.mark.parametrize("regrowth", [True, False])
def test_a_training_ends_with_a_smaller_model(schedule: Schedule, regrowth: bool, tmp_path: Path) -> None:
    plan = PruningPlan(Structured(0.5, ["channels", "heads"]), solver=SparseGPT())
    module, prune = lit(), Prune(plan, schedule, regrowth=regrowth)
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(module, data())
    assert prune.report is not None and prune.report.sparsity == 0.5
    small = load_model(str(tmp_path / "out"))
    config = small.config
    sizes = (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads)  # type: ignore[union-attr]
    assert sizes == (24, 1, 2)
    batch = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        trained = module.model.eval()(input_ids=batch).logits
        assert distance(small(input_ids=batch).logits, trained) <= network(module.model)


def test_heads_that_go_late_let_no_channel_come_back(tmp_path: Path) -> None:
    # 30 % of 2 key-value heads and 48 channels are one head and 8 channels. On the way, at 21 %, it is 0.4 of a head:
    # if 17 channels made up for it, as they would if that were the end, 9 would have to come back with the head.
    plan = PruningPlan(Structured(0.3, ["channels", "heads"]), solver=SparseGPT())
    module, prune = lit(), Prune(plan, Cubic(start=0, end=6, every=2), regrowth=False)
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(module, data())
    assert prune.report is not None and prune.report.sparsity == pytest.approx(0.3)
    config: Any = load_model(str(tmp_path / "out")).config
    assert (config.intermediate_size, config.num_key_value_heads) == (40, 1)


def test_dropout_does_not_disturb_the_comparison_with_the_smaller_model(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "resid_pdrop": 0.5}
    module = LitCausalLM("random", config=config)
    prune = Prune(PruningPlan(Structured(0.5), solver=SparseGPT()))
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(module, data())
    assert load_model(str(tmp_path / "out")).config.n_inner == 24  # type: ignore[union-attr]


def test_a_checkpoint_is_exported_as_a_smaller_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = {
        "model": {"pretrained": "random", "config": LLAMA},
        "data": {"dataset": "embedded", "sequences": 4, "seqlen": 16, "max_windows": 16},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    plan = ["--plan", "structured", "--sparsity", "0.5"]
    callbacks = ["--trainer.callbacks+=KeepMasks", "--trainer.callbacks+=Export", "--trainer.callbacks.Export.output=a"]
    checkpoints = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.ModelCheckpoint.dirpath=checkpoints"]
    assert main(["fit", "-c", "run.yaml", *plan, *callbacks, *checkpoints]) == 0
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    export = ["export", "-c", "run.yaml", *plan, "--checkpoint", str(checkpoint)]
    assert main([*export, "--output", "b"]) == 0
    weights = [load_model(folder).state_dict() for folder in ("a", "b")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    again = ["export", "-c", "run.yaml", "--model.config", "null", "--model.pretrained", "b"]
    assert main([*again, "--to", "hf-sharded", "--output", "c"]) == 0
    assert load_model("c").config.intermediate_size == 24  # type: ignore[union-attr]
    for command in (export, again):
        assert main([*command, "--to", "bitmask", "--output", "d"]) == 2
        assert "has no zeros to leave out" in capsys.readouterr().err


def test_blocks_are_reconstructed_within_their_units(tmp_path: Path) -> None:
    plan = PruningPlan(Structured(0.5), Wanda(), reconstruction=Reconstruction(steps=8, norms_and_biases=True))
    prune = Prune(plan)
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(lit(), data())
    assert prune.report is not None
    assert all(done.after < done.before for done in prune.report.reconstructions)
    assert load_model(str(tmp_path / "out")).config.intermediate_size == 24  # type: ignore[union-attr]


def test_plain_adapters_would_have_other_sizes() -> None:
    module = lit()
    module.trainable = LoRA(rank=2, masked=False)
    with pytest.raises(InputError, match="plain adapters would have the sizes of the larger model"):
        trainer(Prune(PruningPlan(Structured(0.5), Wanda())), KeepMasks()).fit(module, data())


def test_masked_adapters_are_merged_into_the_smaller_model(tmp_path: Path) -> None:
    module = lit()
    module.trainable = LoRA(rank=2)
    prune = Prune(PruningPlan(Structured(0.5), Wanda()))
    trainer(prune, KeepMasks(), Export(str(tmp_path / "out"))).fit(module, data())
    assert load_model(str(tmp_path / "out")).config.intermediate_size == 24  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "plan",
    [
        PruningPlan(Structured(0.5, "blocks"), Wanda()),
        PruningPlan(Structured(0.5, ["channels", "blocks"]), Wanda(), Measured()),
    ],
)
def test_blocks_are_not_removed_in_training(plan: PruningPlan) -> None:
    prune = Prune(plan)
    with pytest.raises(InputError, match="remove blocks with lit-prune prune first"):
        trainer(prune, KeepMasks()).fit(lit(), data())
