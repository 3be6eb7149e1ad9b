"""An allocation read from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

from lit_prune.allocators.base import Allocator, Layer, check_bounds, meet_budget
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class FromFile(Allocator):
    """Sparsity of each layer from a JSON file, scaled to the target.

    The file contains ``{"model.layers.0.self_attn.q_proj": 0.4, "model.layers.1.*": 0.6, ...}`` (names or shell
    patterns; the first match applies), or is the ``pruning.json`` of an earlier run. Only the proportions matter:
    values are scaled to the run's target, clipped to the bounds, and redistributed until the mean is exact.

    .. code-block:: yaml

        allocator: {class_path: FromFile, init_args: {path: allocation.json, max_sparsity: 0.95}}
    """

    path: str
    """JSON file: an object that maps layer names or shell patterns to sparsities, or a ``pruning.json``."""
    min_sparsity: float = 0.0
    """Lowest sparsity of a layer."""
    max_sparsity: float = 0.99
    """Highest sparsity of a layer."""
    _sparsities: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate the arguments, and read the file."""
        check_bounds(self.min_sparsity, self.max_sparsity)
        object.__setattr__(self, "_sparsities", _read(Path(self.path).expanduser()))

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the file's sparsities scaled to the target; entries and layers must match each other completely."""
        for pattern in self._sparsities:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise InputError(f"allocator.path is {self.path!r}: its {pattern!r} matches no layer of this model")
        proposed = {layer.name: self._value(layer.name) for layer in layers}
        return meet_budget(layers, proposed, target, self.min_sparsity, self.max_sparsity)

    def _value(self, name: str) -> float:
        for pattern, value in self._sparsities.items():
            if fnmatchcase(name, pattern):
                return value
        raise InputError(f"allocator.path is {self.path!r}: it gives no sparsity for {name}")


def _is_sparsity(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _read(path: Path) -> dict[str, float]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"allocator.path is {str(path)!r}: there is no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"allocator.path is {str(path)!r}: it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"allocator.path is {str(path)!r}: not a JSON file ({error})") from None
    if isinstance(content, dict) and isinstance(content.get("layers"), list):
        try:
            content = {layer["name"]: layer["asked"] for layer in content["layers"]}
        except (KeyError, TypeError):
            raise InputError(
                f"allocator.path is {str(path)!r}: its layers have no name and asked sparsity, as in a pruning.json"
            ) from None
    wrong = not isinstance(content, dict) or [v for v in content.values() if not _is_sparsity(v)]
    if wrong or not content:
        raise InputError(
            f"allocator.path is {str(path)!r}: it must hold an object of layer name to sparsity, in [0, 1]"
        )
    return {str(name): float(value) for name, value in content.items()}
