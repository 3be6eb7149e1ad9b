"""Layer 4: the LightningModule of a causal language model, and its data module."""

from lit_prune.training.data import TextDataModule
from lit_prune.training.losses import Distillation, LanguageModelLoss, Loss
from lit_prune.training.module import LitCausalLM
from lit_prune.training.recovery import Everything, LoRA, NormsAndBiases, Trainable
from lit_prune.training.schedules import WarmupCosine

__all__ = [
    "Distillation",
    "Everything",
    "LanguageModelLoss",
    "LitCausalLM",
    "LoRA",
    "Loss",
    "NormsAndBiases",
    "TextDataModule",
    "Trainable",
    "WarmupCosine",
]
