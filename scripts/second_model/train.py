"""Train a small GPT-NeoX language model from scratch on the prose that ``prose.py`` collected, for a given time.

The model has 9.4 million parameters, of which 2 million are embeddings: six layers of width 320 with parallel attention
and MLP, fused query-key-value projections, GELU and rotary embeddings, and a BPE vocabulary of 6,144 tokens of its own.
The learning rate follows the fraction of the time that is spent, so training ends with a low one on a machine of any
speed, and the tokens seen depend on that speed. It is saved every few minutes and resumed by the same command.

    python scripts/second_model/prose.py out/second/text
    python scripts/second_model/train.py out/second/text out/second/model --minutes 120
    lit-prune test --model.pretrained out/second/model --data.dataset out/second/text/test.jsonl --data.seqlen 256
"""

from __future__ import annotations

import argparse
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lit_prune.checkpoint.files import replacing_folder
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.text_files import read_file

END = "<|endoftext|>"
VOCABULARY = 6144
SEQLEN = 256
BATCH = 16
RATE = 1.5e-3


class TimedCosine(Callback):
    """Warm up for 1 % of the time, then let the learning rate fall as a cosine to a fiftieth, and stop training.

    The time spent is part of the checkpoint.
    """

    def __init__(self, minutes: float, output: Path) -> None:
        """Store the minutes of training in all, and the folder to which the trained model is saved."""
        self.seconds = 60 * minutes
        self.output = output
        self.spent = 0.0
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent."""
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds spent."""
        self.spent = state_dict["spent"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic() - self.spent

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of this batch."""
        share = self.spent / self.seconds
        factor = 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, share))) / 2
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = RATE * min(factor, (share + 1e-4) / 0.01)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop once the time is spent; print the progress of every hundredth step."""
        self.spent = time.monotonic() - self._start
        trainer.should_stop = self.spent >= self.seconds
        if trainer.global_step % 100 == 0:
            loss, tokens = trainer.callback_metrics["train/loss"], trainer.global_step * BATCH * SEQLEN
            print(f"{self.spent / 60:.1f} minutes, {tokens / 1e6:.2f} M tokens, loss {loss:.3f}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the perplexity and save the model."""
        print(f"validation perplexity {trainer.callback_metrics['val/perplexity']:.2f}", flush=True)
        save(pl_module.model, pl_module.load_tokenizer(), self.output)  # type: ignore[operator, arg-type]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on ``texts``."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def untrained() -> GPTNeoXForCausalLM:
    """Return the model with random weights."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=320,
            num_hidden_layers=6,
            num_attention_heads=5,
            intermediate_size=1280,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def save(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a Hugging Face folder, in place of an earlier one."""
    with replacing_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Return AdamW with the settings that small language models are trained with."""
    return torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)


def main() -> None:
    """Train the tokenizer, then the model, or resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("output", type=Path, help="folder of the model; checkpoints are written beside it")
    parser.add_argument("--minutes", type=float, default=120, help="time of training, in all")
    options = parser.parse_args()
    seed_everything(0)
    start = options.output.with_name(f"{options.output.name}-untrained")
    if not start.exists():
        save(untrained(), train_tokenizer(read_file(options.texts / "train.jsonl", "text")), start)
    module = LitCausalLM(str(start), dtype="float32", optimizer=optimizer)
    data = TextDataModule(
        str(start),
        train=str(options.texts / "train.jsonl"),
        val=str(options.texts / "validation.jsonl"),
        seqlen=SEQLEN,
        batch_size=BATCH,
    )
    checkpoints = ModelCheckpoint(
        options.output.with_name(f"{options.output.name}-checkpoints"),
        save_last=True,
        save_top_k=0,
        train_time_interval=timedelta(minutes=3),
    )
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=8,
        val_check_interval=500,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[TimedCosine(options.minutes, options.output), checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = Path(str(checkpoints.dirpath)) / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=False)
    save(module.model, module.load_tokenizer(), options.output)


if __name__ == "__main__":
    main()
