"""Private names of DeepSpeed, whose public functions cover only single masters and moments of ZeRO-3."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_managed(parameter: Any) -> bool:
    """Return whether ZeRO-1 or -2 manages a parameter."""
    return hasattr(parameter, "_hp_mapping")


def fragments(parameter: Any) -> Any:
    """Return this process's shard of a parameter's master and moments under ZeRO-1 and -2; None if it has none."""
    return parameter._hp_mapping


def in_training(parameter: Any) -> bool:
    """Return whether a parameter under ZeRO-3 has a master."""
    return hasattr(parameter, "_z3_optimizer")


def state_of_group(parameter: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the flat master that contains a parameter under ZeRO-3, and the optimizer state of that master.

    Used to find the names of the moments, which the public functions require.
    """
    optimizer = parameter._z3_optimizer
    group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return flat, optimizer.optimizer.state[flat]
