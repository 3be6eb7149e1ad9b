"""Conversion of plain data, as from JSON, to the types of type hints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

_NEEDED = {float: "a number", int: "a whole number", str: "a string", list: "a list", tuple: "a list"}


def typed(value: Any, hint: Any, name: str) -> Any:
    """Convert plain data to the type of a hint.

    Args:
        value: numbers, strings, booleans, None, and lists and dicts of them.
        hint: ``Any``, a scalar type, ``X | None`` in this order, ``list``, ``dict`` or ``tuple`` with arguments, a
            dataclass, a ``NamedTuple`` or a ``TypedDict``. JSON has no NaN: None is NaN if a number is expected.
        name: name of the value, for errors.

    Raises:
        TypeError: if a part has another type, is missing or is unknown; names the first such part.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any or (value is None and NoneType in inner):
        return value
    if kind in (Union, UnionType):
        return typed(value, inner[0], name)
    if kind is float and (value is None or isinstance(value, float) or _is_whole(value)):
        return math.nan if value is None else float(value)
    if isinstance(value, (dict, list, tuple)) and (parts := _parts(value, kind, inner, name)) is not None:
        return parts
    if is_typeddict(kind) or not (_is_whole(value) if kind is int else isinstance(value, kind)):
        raise TypeError(f"{name} is {value!r:.80}: {_NEEDED.get(kind, 'an object')} is needed")
    return value


def _parts(value: Any, kind: Any, inner: tuple[Any, ...], name: str) -> Any:
    """Convert the parts of a container to the types of their hints; None if the value is of another kind."""
    if isinstance(value, dict) and kind is dict:
        return {key: typed(part, inner[1], f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, dict) and (is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "_fields")):
        return kind(**typed_fields(value, get_type_hints(kind), _required(kind), f"{name}."))
    if isinstance(value, list) and kind is list:
        return [typed(part, inner[0], f"{name}[{place}]") for place, part in enumerate(value)]
    if not isinstance(value, dict) and kind is tuple and len(value) == len(inner):
        return tuple(typed(*both, f"{name}[{place}]") for place, both in enumerate(zip(value, inner, strict=True)))
    return None


def _required(kind: Any) -> Iterable[str]:
    """Return the names of the fields without a default."""
    if is_dataclass(kind):
        return [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    return kind.__required_keys__ if is_typeddict(kind) else [n for n in kind._fields if n not in kind._field_defaults]


def typed_fields(
    values: Mapping[str, Any], hints: Mapping[str, Any], required: Iterable[str], prefix: str = ""
) -> dict[str, Any]:
    """Convert fields by name to the types of their hints; unknown fields are an error.

    Args:
        values: plain data by name.
        hints: types by name.
        required: names of the required fields.
        prefix: prefix of the names, for errors.

    Raises:
        TypeError: as for ``typed``.
    """
    if lacking := [name for name in required if name not in values]:
        raise TypeError(f"{prefix}{lacking[0]} is missing")
    if unknown := [name for name in values if name not in hints]:
        raise TypeError(f"{prefix}{unknown[0]:.80} is unknown")
    return {name: typed(value, hints[name], f"{prefix}{name}") for name, value in values.items()}


def _is_whole(value: Any) -> bool:
    """Return whether a value is an integer of ordinary size; in JSON an integer can have hundreds of digits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
