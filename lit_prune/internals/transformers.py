"""Private names of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def gate_of(experts: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that fused experts apply to the outputs of gate and up matrices, which differs by model."""
    return experts._apply_gate


def ignored_keys(model: Any) -> tuple[str, ...]:
    """Return patterns of weights that may be in a model's files but are not part of the model."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def has_adapter(model: Any) -> bool:
    """Return whether a model was loaded from a folder with an adapter, which transformers applies automatically."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def mark_initialized(module: Any) -> None:
    """Keep ``from_pretrained`` from initializing a module that lacks weights which its family initializes."""
    module._is_hf_initialized = True
