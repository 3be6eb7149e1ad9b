"""Private names of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def gate_of(experts: Any) -> Callable[[Tensor], Tensor]:
    """Return what fused experts do with the outputs of their gate and up matrices; some models have their own."""
    return experts._apply_gate


def ignored_keys(model: Any) -> tuple[str, ...]:
    """Return patterns of weights that may be in a model's files without a place in it."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def has_adapter(model: Any) -> bool:
    """Tell whether a model was loaded from a folder with an adapter, which transformers puts on without being asked."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))
