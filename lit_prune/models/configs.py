"""The configs that lie beside a model's weights, where it is not transformers that writes or reads these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig


def save_configs(folder: Path, model: Any) -> None:
    """Write a model's config and, where it can generate, its generation config, as ``save_pretrained`` does."""
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_generation_config(folder: Path, model: Any) -> None:
    """Give a model the generation config of its folder, where there is one."""
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
