"""Checks that the weights of a loaded model are complete, belong to it, and are finite."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.checkpoint.files import read_json
from lit_prune.checkpoint.folders import FLOATING, stored_dtypes, weight_files
from lit_prune.errors import InputError
from lit_prune.internals.transformers import ignored_keys

_OBSOLETE = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Regular expressions of buffers that older versions of transformers saved, and newer ones compute."""


def on_meta(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model of a config on the meta device, where its weights take no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def check_complete(found: Mapping[str, Any], pretrained: str) -> None:
    """Raise ``InputError`` if a model's files lack weights, which would be random, or contain those of another model.

    Args:
        found: loading info of ``from_pretrained`` with ``output_loading_info``.
        pretrained: name of the model, for errors.
    """
    shapes = {name: f"{name} {list(there)}, and not {list(asked)}" for name, there, asked in found["mismatched_keys"]}
    for fault, names in (
        ("lacks {}, so it would be random", found["missing_keys"]),
        ("holds {}, which a model of its config does not have", found["unexpected_keys"]),
        ("holds {}, as its config says", shapes.values()),
    ):
        refuse(pretrained, fault, names)


def refuse(pretrained: str, fault: str, names: Collection[str]) -> None:
    """Raise ``InputError`` if there are ``names`` of weights with a ``fault``, a message with ``{}`` for the names."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"model.pretrained is {pretrained!r}: it {fault.format(f'{min(names)}{more}')}; its weights and its "
            "config.json do not belong together, or a file is incomplete"
        )


def ignored_by(model: Any, name: str) -> bool:
    """Return whether a model ignores a weight that is in its files."""
    patterns = (*ignored_keys(model), *_OBSOLETE)
    return any(re.search(pattern, name) for pattern in patterns)


def check_dtypes(folder: Path, model: nn.Module) -> None:
    """Raise ``InputError`` if a parameter of a model is stored in a dtype other than floating point.

    It would be cast silently. Stored buffers may be integers. Quantized models, whose quantizer reads other dtypes, are
    exempt.
    """
    if (folder / "config.json").is_file() and "quantization_config" in read_json(folder / "config.json"):
        return
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # checkpoints without a head lack this prefix
    for file in weight_files(folder):
        for name, dtype in stored_dtypes(file).items():
            if dtype not in FLOATING and not {name, f"{prefix}{name}"} & buffers and not ignored_by(model, name):
                raise InputError(f"{str(file)!r} holds {name} as {dtype}: a weight must be {', '.join(FLOATING)}")


def check_finite(name: str, values: Tensor, where: str) -> None:
    """Raise an ``InputError`` that names a weight, and ``where`` it is from, if it contains NaN or Inf."""
    if values.is_floating_point() and values.numel() and not all(extreme.isfinite() for extreme in values.aminmax()):
        count = int((~values.isfinite()).sum())
        raise InputError(
            f"{where}: {name} holds NaN or Inf in {count:,} of {values.numel():,} places; it is damaged, or its "
            "training diverged"
        )


def check_all_finite(model: nn.Module, where: str) -> None:
    """Raise an ``InputError`` that names the first weight or persistent buffer of a model with NaN or Inf, if any."""
    for name, values in model.state_dict().items():
        check_finite(name, values, where)
