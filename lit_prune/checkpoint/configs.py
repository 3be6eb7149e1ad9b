"""Configs stored with a model's weights, for formats that transformers does not write or read itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from lit_prune.checkpoint.folders import check_size
from lit_prune.checkpoint.packed import is_packed
from lit_prune.errors import InputError


def save_configs(folder: Path, model: Any) -> None:
    """Write a model's config and, if it can generate, its generation config, like ``save_pretrained``."""
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_generation_config(folder: Path, model: Any) -> None:
    """Load a model's generation config from its folder, if there is one."""
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def read_config(location: str | Path, pretrained: str, trust_remote_code: bool, weights_per_byte: int = 1) -> Any:
    """Read and check a model's config before anything is allocated.

    Args:
        location: folder, or name on the hub.
        pretrained: name of the model, for errors.
        trust_remote_code: whether to run code that comes with the model.
        weights_per_byte: maximum number of weights per byte of the model's files.

    Raises:
        InputError: if the model is an encoder-decoder, is far larger than its files, requires code from a hub, or
            refers to weights outside its folder.
    """
    config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise InputError(
            f"model.pretrained is {pretrained!r}: {config.model_type} is an encoder and a decoder; give the folder or "
            "the name of a causal language model"
        )
    for kind in ("attn", "experts"):
        kernel = getattr(config, f"_{kind}_implementation", None)
        if not trust_remote_code and "/" in str(kernel):
            raise InputError(
                f"model.pretrained is {pretrained!r}: its config asks for the {kind}_implementation {kernel!r}, code "
                "of a hub; take it out of config.json, or set model.trust_remote_code"
            )
    weights = str(getattr(config, "transformers_weights", None) or "")
    if Path(weights).is_absolute() or ".." in Path(weights).parts:
        raise InputError(
            f"model.pretrained is {pretrained!r}: {weights!r}, which its config names, is outside of the folder; copy "
            "it there"
        )
    if Path(location).is_dir():
        check_size(Path(location), config, 8 if is_packed(location) else weights_per_byte)  # a mask alone is a bit
    return config
