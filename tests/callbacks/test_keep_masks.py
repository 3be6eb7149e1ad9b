"""Where masks come from, which strategies are refused, and training that could revive a weight, on one device."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import save_file

from lit_prune.callbacks import KeepMasks, Prune
from lit_prune.callbacks.keep_masks import check_strategy
from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask, Unstructured
from lit_prune.pruning import PruningPlan, Step
from lit_prune.scorers import Magnitude, Wanda
from lit_prune.scorers.base import Scorer
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.strategies import FSDP2, DeepSpeed
from support.training import LLAMA, SMALLER
from support.training import trainer as quiet_trainer

trainer = partial(quiet_trainer, max_steps=6, limit_val_batches=2, val_check_interval=3)
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}  # Conv1D: [i, o]
UP = "model.layers.0.mlp.up_proj.weight"


def data() -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=16, sequences=4, max_windows=64, batch_size=2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def lit(pretrained: str = "random", config: dict[str, Any] = LLAMA, **options: Any) -> LitCausalLM:
    torch.manual_seed(0)
    own = config if pretrained == "random" else None
    return LitCausalLM(pretrained, config=own, **{"optimizer": adamw, **options})


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A folder with a model of which one matrix is pruned by half."""
    module = lit()
    module.configure_model()
    keep = torch.rand(48, 32) < 0.5
    module.model.get_parameter(UP).data.mul_(keep)
    save_pruned(tmp_path / "pruned", module.model, module.load_tokenizer(), {UP: PackedMask.pack(keep)}, {})
    return tmp_path / "pruned"


@pytest.mark.parametrize("source", ["folder", "file", "zeros"])
def test_a_pruned_model_is_fine_tuned(source: str, pruned: Path) -> None:
    module = lit(str(pruned))
    masks = {"folder": str(pruned), "file": str(pruned / "masks.safetensors"), "zeros": "zeros"}[source]
    keeper = KeepMasks(masks)
    trainer(keeper).fit(module, data())
    assert list(keeper.masks) == [UP]
    expected = load_masks(pruned)
    assert torch.equal(keeper.masks[UP].bits, expected[UP].bits)
    check_masks_hold(module.model, expected)
    before = lit(str(pruned))
    before.configure_model()
    kept = expected[UP].unpack()
    assert (module.model.get_parameter(UP)[kept] != before.model.get_parameter(UP)[kept]).all()


def test_masks_that_were_given_are_resumed_without_their_folder(pruned: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(KeepMasks(str(pruned)), checkpoint).fit(lit(str(pruned)), data())
    expected = load_masks(pruned)
    (pruned / "masks.safetensors").unlink()
    module, keeper = lit(str(pruned)), KeepMasks(str(pruned))
    trainer(keeper).fit(module, data(), ckpt_path=str(tmp_path / "at-step=3.ckpt"), weights_only=True)
    assert torch.equal(keeper.masks[UP].bits, expected[UP].bits)
    check_masks_hold(module.model, expected)


def test_masks_of_another_model_are_refused(pruned: Path) -> None:
    with pytest.raises(InputError, match=rf"masks are for another model: it has no {UP} of shape \(48, 32\)"):
        trainer(KeepMasks(str(pruned))).fit(lit(config={**LLAMA, "intermediate_size": 40}), data())
    with pytest.raises(InputError, match="masks are for another model"):
        trainer(KeepMasks(str(pruned))).fit(lit(config=GPT2), data())
    module = lit()  # the dense model, whose pruned weights are not zero: the masks alone would make a worse one of it
    with pytest.raises(
        InputError, match=r"values that they prune are not zero in model\.layers\.0.*set --model\.pretr"
    ):
        trainer(KeepMasks(str(pruned))).fit(module, data())
    dense = lit()
    dense.configure_model()
    assert torch.equal(module.model.get_parameter(UP), dense.model.get_parameter(UP))


def test_masks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        trainer(KeepMasks(str(tmp_path / "nothing"))).fit(lit(), data())
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="the file holds none"):
        trainer(KeepMasks(str(tmp_path / "weights.safetensors"))).fit(lit(), data())
    with pytest.raises(InputError, match="no weight of the model is zero"):
        trainer(KeepMasks("zeros")).fit(lit(), data())


def test_masks_must_come_from_somewhere() -> None:
    with pytest.raises(InputError, match="add a Prune callback, or set its masks to a pruned folder or 'zeros'"):
        trainer(KeepMasks()).fit(lit(), data())


def test_a_strategy_that_cannot_hold_masks_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"FSDPStrategy: it cannot hold masks; use ddp, lit_prune.*FSDP2 or .*DeepSpeed"
    ):
        check_strategy(FSDPStrategy())
    for strategy in (FSDP2(), DeepSpeed(3), Trainer(accelerator="cpu", strategy="ddp").strategy):
        check_strategy(strategy)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}


def prune_twice(module: LitCausalLM, scorer: Scorer | None = None, **options: Any) -> dict[str, PackedMask]:
    """Prune at steps 0 and 3 of 6, and return the masks, which hold."""
    prune = Prune(PruningPlan(Unstructured(0.5), scorer or Magnitude()), Step(every=3, times=2))
    trainer(prune, KeepMasks(), **options).fit(module, data())
    assert prune.report is not None and prune.report.sparsity == pytest.approx(0.5, abs=1e-3)
    check_masks_hold(module.model, prune.report.masks)
    return prune.report.masks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_element_wise_optimizers_hold_masks(optimizer: str) -> None:
    prune_twice(lit(optimizer=OPTIMIZERS[optimizer]))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_an_optimizer_that_mixes_elements_fails_the_audit() -> None:
    def muon(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-2)

    with pytest.raises(RuntimeError, match=r"q_proj\.weight: \d+ pruned weights are not zero in its weight"):
        prune_twice(lit(optimizer=muon))


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_masks_hold_with_clipped_gradients(algorithm: str) -> None:
    prune_twice(lit(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)


def test_masks_hold_with_recomputed_activations() -> None:
    module = lit(gradient_checkpointing=True)
    prune_twice(module)
    assert module.model.is_gradient_checkpointing


@pytest.mark.parametrize("config", [{**LLAMA, "tie_word_embeddings": True}, GPT2], ids=["llama", "gpt2"])
def test_masks_hold_with_tied_embeddings(config: dict[str, Any]) -> None:
    module = lit(config=config)
    masks = prune_twice(module, scorer=Wanda())
    assert module.model.lm_head.weight is module.model.get_input_embeddings().weight
    assert masks and not any("embed" in name or "wte" in name or "lm_head" in name for name in masks)


@pytest.mark.parametrize(
    ("part", "backend"),
    # aot_eager is all of torch.compile but the code generator, which takes minutes for a whole model.
    [("model", "aot_eager"), ("blocks", "aot_eager"), ("mlp", "inductor")],
)
def test_masks_hold_in_a_compiled_model(part: str, backend: str) -> None:
    if backend == "inductor" and os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        pytest.skip(
            "torch 2.13 generates vectorised code although the capability has no vectors, which does not compile"
        )

    class Compiled(LitCausalLM):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                blocks = self.model.model.layers
                parts = {"model": [self.model], "blocks": blocks, "mlp": [block.mlp for block in blocks]}
                for module in parts[part]:
                    module.compile(backend=backend)

    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    torch.manual_seed(0)
    module = Compiled("random", config=SMALLER, optimizer=adamw)
    masks = prune_twice(module, scorer=Wanda())  # whose calibration needs hooks in the compiled blocks
    assert frames["ok"] > 0
    plain = lit(config=SMALLER)
    expected = prune_twice(plain, scorer=Wanda())
    for name, mask in expected.items():
        assert torch.equal(masks[name].bits, mask.bits)
        torch.testing.assert_close(module.model.get_parameter(name), plain.model.get_parameter(name))
