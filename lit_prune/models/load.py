"""Load a causal language model from a hub name, a folder, a GGUF file or a bitmask export, or with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from lit_prune.checkpoint.bitmask import BITMASK_FILE, read_bitmask
from lit_prune.checkpoint.configs import load_generation_config, read_config
from lit_prune.checkpoint.folders import check_folder
from lit_prune.errors import InputError
from lit_prune.internals.transformers import has_adapter
from lit_prune.models.experts import apart
from lit_prune.models.gguf import check_described_weights, check_gguf
from lit_prune.models.locate import RANDOM, explained, locate
from lit_prune.models.quiet import quiet_transformers
from lit_prune.models.tokenizer import byte_tokenizer
from lit_prune.models.weights import check_all_finite, check_complete, check_dtypes, on_meta
from lit_prune.sharding.offload import open_lazily

_MOST_LAYERS = 10_000
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""Values of a config that are at least 1."""


def load_model(
    pretrained: str,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    lazy: str | Path | None = None,
) -> nn.Module:
    """Load a causal language model in evaluation mode.

    Args:
        pretrained: hub name, local Hugging Face folder, ``bitmask`` export, path of a GGUF file, or ``random``.
        dtype: dtype of the weights; None = as stored.
        config: configuration of a ``random`` model: its ``model_type`` and any value of that model's config.
        trust_remote_code: whether to run code that comes with the model.
        lazy: folder for changed blocks. The model stays on disk, in safetensors files, and each block is loaded while
            it is processed; None = the whole model is loaded.

    Raises:
        InputError: if there is no such model, or the hub cannot be reached.
    """
    if lazy is not None:
        with explained(pretrained):
            model = open_lazily(pretrained, lazy, dtype, trust_remote_code)
            check_dtypes(_folder(pretrained), model)
            return model
    if pretrained == RANDOM:
        return _random_model(config, dtype or torch.float32).eval()
    if (Path(pretrained).expanduser() / BITMASK_FILE).is_file():
        return _load_bitmask(Path(pretrained).expanduser(), dtype, trust_remote_code).eval()
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    with explained(pretrained):
        location, extra = locate(pretrained)
        if extra:
            file = Path(pretrained).expanduser()
            if stored := check_gguf(file, pretrained):
                check_described_weights(file, pretrained, stored)
        else:
            read_config(location, pretrained, trust_remote_code)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with quiet_transformers():  # transformers prints a table; the errors are reported below in one line
            loaded: Any = AutoModelForCausalLM.from_pretrained(location, **extra, **options)
        model, found = loaded
        if has_adapter(model):
            raise InputError(f"model.pretrained is {pretrained!r}: it is an adapter; merge it into its model first")
        check_complete(found, pretrained)
        if not extra:
            check_dtypes(_folder(location), model)
        check_all_finite(model, f"model.pretrained is {pretrained!r}")
    if extra:  # transformers has dequantised the GGUF file to a plain float model
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None
    return model.eval()


def _load_bitmask(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> nn.Module:
    with explained(str(folder)):
        check_folder(folder, str(folder))
        config = read_config(folder, str(folder), trust_remote_code, weights_per_byte=8)
        as_stored = dtype is None
        dtype = dtype or config.dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        load_generation_config(folder, model)
    weights = read_bitmask(folder)
    _check_bitmask_dtypes(folder / BITMASK_FILE, weights, model, config.dtype or torch.float32)
    with apart(model) if not model.state_dict().keys() <= weights.keys() else nullcontext():
        try:
            # In the dtypes of the file, which may differ between tensors.
            model.load_state_dict(weights, assign=as_stored)
        except RuntimeError as error:
            raise InputError(
                f"model.pretrained is {str(folder)!r}: its {BITMASK_FILE} and its config.json do not belong together "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
    model.tie_weights()
    check_all_finite(model, f"model.pretrained is {str(folder)!r}")
    return model


def _check_bitmask_dtypes(file: Path, weights: Mapping[str, Tensor], model: nn.Module, dtype: torch.dtype) -> None:
    """Raise ``InputError`` if a parameter is neither in the dtype of the config nor in float32, which some models keep.

    Tensors keep the dtypes of the file, and a layer whose weight has another one than its inputs fails.
    """
    buffers = {name for name, _ in model.named_buffers()}
    for name, values in weights.items():
        if name not in buffers and values.dtype not in (dtype, torch.float32):
            raise InputError(f"{str(file)!r} holds {name} as {values.dtype}: it must be {dtype}, as in config.json")


def _folder(location: str) -> Path:
    """Return the folder of a model that has been loaded; for a name on the hub, the folder in the hub's cache."""
    folder = Path(location).expanduser()
    return folder if folder.is_dir() else Path(snapshot_download(location, local_files_only=True))


def _random_model(config: Mapping[str, Any] | None, dtype: torch.dtype) -> nn.Module:
    if not config or "model_type" not in config:
        raise InputError("model.pretrained is 'random': model.config must name a model_type, such as llama")
    values = dict(config)
    model_type = values.pop("model_type")
    values.setdefault("vocab_size", len(byte_tokenizer()))
    try:
        _check_sizes(model_type, values)
        made = AutoConfig.for_model(model_type, **values)
        _refuse_unknown(values, made)
        _check_memory(made, dtype)
        _check_heads(made)
        return AutoModelForCausalLM.from_config(made, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # each architecture raises its own types for invalid values
        raise InputError(
            f"model.config makes no causal language model ({' '.join(str(error).split())[:300]})"
        ) from error


def _check_sizes(model_type: str, values: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if a size is below 1, or if the layers are too many even to be listed."""
    renamed = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    usual = {own: name for name, own in renamed.items()}
    for name, value in values.items():
        if not isinstance(value, int) or usual.get(name, name) not in _SIZES:
            continue
        if value < 1:
            raise InputError(f"model.config.{name} is {value}: it must be at least 1")
        if usual.get(name, name) == "num_hidden_layers" and value > _MOST_LAYERS:
            raise InputError(f"model.config.{name} is {value:,}: it must be from 1 to {_MOST_LAYERS:,}")


def _check_heads(config: PreTrainedConfig) -> None:
    """Raise ``InputError`` if key and value heads cannot be shared equally; the forward pass would fail."""
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise InputError(f"model.config.num_key_value_heads is {shared}: it must divide num_attention_heads, {heads}")


def _check_memory(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Raise ``InputError`` if a model would take more than the free memory."""
    model = on_meta(config, dtype)
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"model.config makes a model of {needed / 1e9:,.0f} GB, and {free / 1e9:,.1f} GB of memory are free: lower "
            "its sizes"
        )


def _refuse_unknown(values: Mapping[str, Any], made: PreTrainedConfig) -> None:
    """Raise ``InputError`` if a config was given a value whose name is a probable misspelling of a known one.

    Other unknown names are accepted: some models read values that their configs do not declare, such as Qwen3-MoE's
    ``head_dim``.
    """
    known = {*vars(type(made)()), *made.attribute_map, *inspect.signature(type(made)).parameters}
    for name in values.keys() - known:
        if near := get_close_matches(name, known, n=1, cutoff=0.85):
            raise InputError(f"model.config.{name} is not a value of {type(made).__name__}; did you mean {near[0]}?")
