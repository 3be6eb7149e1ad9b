"""Layer 4: the LightningModule around a language model, and its data."""

from lit_prune.training.data import TextDataModule
from lit_prune.training.module import LitCausalLM

__all__ = ["LitCausalLM", "TextDataModule"]
