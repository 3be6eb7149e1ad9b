"""Tiny Llamas, and a trainer that says and writes nothing by itself."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
"""Configuration for ``load_model("random", config=LLAMA)`` and ``LitCausalLM``."""
SMALLER = {**LLAMA, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
"""One block alone, if nothing is asked of the others."""


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a trainer on CPUs, which writes checkpoints only if there is a ``ModelCheckpoint`` among its callbacks."""
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    checkpoints = {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    return Trainer(**{**quiet, **checkpoints, **options}, callbacks=list(callbacks))
