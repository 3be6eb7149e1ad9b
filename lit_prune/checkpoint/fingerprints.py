"""Digests of models and calibration data, for the identity of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.models.weights import check_finite
from lit_prune.sharding.block_store import BlockStore, store_of
from lit_prune.sharding.parameters import persistent_buffers

_NOT_COMPUTED = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "name_or_path")
"""Config values that depend on where and how a model was saved, and do not affect its computations."""


_PIECE = 2**24
"""Number of values to hash at once."""


def model_fingerprint(model: nn.Module, store: BlockStore | None = None) -> str:
    """Return a digest of the model's config, and of name, shape, dtype and values of parameters and persistent buffers.

    Args:
        model: model to hash.
        store: store of the model's blocks; None = the model's own store, or the model itself.

    Raises:
        InputError: if a value is NaN or infinite.
    """
    store, values = store or store_of(model), {}
    for part in store.parts(model):
        with store.resident(part):
            for name, parameter in part.module.named_parameters(prefix=part.name):
                values[name] = _values(name, parameter)
    digest = hashlib.sha256(_config(model))
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.get(name) or _values(name, tensor))
    return digest.hexdigest()[:16]


def _config(model: nn.Module) -> bytes:
    """Return the values of a transformers config that affect the model's computations."""
    config: Any = getattr(model, "config", None)
    values = config.to_diff_dict() if config is not None else {}
    kept = {name: value for name, value in values.items() if name not in _NOT_COMPUTED and not name.startswith("_")}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _values(name: str, tensor: Tensor) -> bytes:
    """Return the digest of a tensor's values; raise ``InputError`` if one is not finite."""
    values = tensor.detach()
    check_finite(name, values, "the model")
    digest = hashlib.sha256()
    for piece in values.reshape(-1).split(_PIECE):  # copied, because NumPy makes a storage non-resizable
        digest.update(piece.to("cpu", copy=True).view(torch.uint8).numpy().data)
    return digest.digest()


def data_fingerprint(batches: Sequence[Tensor | Mapping[str, Tensor]]) -> str:
    """Return a digest of the calibration set's tokens, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()) if isinstance(batch, Mapping) else [("input_ids", batch)]:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
