import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_prune.checkpoint.save import save_pruned
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.losses import next_token_loss
from support.rounding import network
from support.training import LLAMA, trainer


@pytest.fixture
def data() -> TextDataModule:
    return TextDataModule("random", dataset="embedded", seqlen=32, max_windows=40, batch_size=3)


def test_the_loss_worked_example() -> None:
    # Two tokens, a vocabulary of two, logits 0 and ln 3 at the first position: the second token, 1, has probability
    # 3/4. The last position predicts nothing and its logits do not count.
    logits = torch.tensor([[[0.0, math.log(3)], [9.0, -9.0]]])
    assert next_token_loss(logits, torch.tensor([[0, 1]])).item() == pytest.approx(math.log(4 / 3))


def test_perplexity_is_the_papers(data: TextDataModule) -> None:
    # exp of the mean, over windows, of each window's mean loss as transformers works it out.
    module = LitCausalLM("random", config=LLAMA)
    result = trainer().test(module, data, verbose=False)[0]
    losses = [
        module.model(input_ids=window[None], labels=window[None]).loss.item()
        for batch in data.test_dataloader()
        for window in batch["input_ids"]
    ]
    mean = sum(losses) / len(losses)
    rounding = network(module.model) * mean  # windows in batches and alone
    assert result["test/perplexity"] == pytest.approx(math.exp(mean), rel=rounding)
    assert result["test/loss"] == pytest.approx(math.log(result["test/perplexity"]))


def test_a_hopeless_model_has_a_finite_perplexity(data: TextDataModule) -> None:
    module = LitCausalLM("random", config=LLAMA)
    module.configure_model()
    module.model.lm_head.weight.data.mul_(2000)
    assert math.isfinite(trainer().test(module, data, verbose=False)[0]["test/perplexity"])


def test_a_batch_without_a_loss_is_not_left_out_of_the_mean(data: TextDataModule) -> None:
    module = LitCausalLM("random", config=LLAMA)
    module.configure_model()
    batches = [set(batch["input_ids"].flatten().tolist()) for batch in data.test_dataloader()]
    rare = min(set().union(*batches), key=lambda token: sum(token in batch for batch in batches))
    assert not all(rare in batch for batch in batches)
    with torch.no_grad():
        module.model.get_input_embeddings().weight[rare] = math.nan
    result = trainer().test(module, data, verbose=False)[0]
    assert math.isnan(result["test/perplexity"]) and math.isnan(result["test/loss"])


def test_training_learns_and_reports_tokens_per_second(data: TextDataModule) -> None:
    torch.manual_seed(0)
    module = LitCausalLM(
        "random",
        config=LLAMA,
        gradient_checkpointing=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10),
    )
    runner = trainer(max_steps=10, log_every_n_steps=1)
    before = trainer().validate(module, data, verbose=False)[0]["val/loss"]
    runner.fit(module, data)
    assert module.model.is_gradient_checkpointing
    assert runner.callback_metrics["train/tokens_per_second"] > 0
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)  # the schedule moved with every step
    assert trainer().validate(module, data, verbose=False)[0]["val/loss"] < before - 0.5


def test_a_saved_model_is_loaded_in_the_asked_precision(tmp_path: Path, data: TextDataModule) -> None:
    module = LitCausalLM("random", config=LLAMA)
    module.configure_model()
    save_pruned(tmp_path / "m", module.model, module.load_tokenizer(), {}, {})
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded = LitCausalLM(str(tmp_path / "m"), dtype=name)  # type: ignore[arg-type]
        loaded.configure_model()
        assert loaded.model.dtype == dtype
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), type(module.model))
