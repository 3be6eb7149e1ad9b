"""Digests of models and of calibration data: the identity of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lit_prune.models.weights import check_finite
from lit_prune.sharding.block_store import BlockStore, store_of


def model_fingerprint(model: nn.Module, store: BlockStore | None = None) -> str:
    """Return a digest of every parameter's name, shape, dtype and up to 4,096 of its values, evenly spread.

    All values are looked at: one that is NaN or infinite is an ``InputError``, wherever it is in the model.

    Args:
        model: the model.
        store: of its blocks; None = the model itself, or as it says.
    """
    store, samples = store or store_of(model), {}
    for part in store.parts(model):
        with store.resident(part):
            for name, parameter in part.module.named_parameters(prefix=part.name):
                samples[name] = _sample(name, parameter)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(samples.get(name) or _sample(name, parameter))
    return digest.hexdigest()[:16]


def _sample(name: str, parameter: Tensor) -> bytes:
    check_finite(name, parameter.detach(), "the model")
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 4096)].double().cpu().numpy().tobytes()


def data_fingerprint(batches: Sequence[Tensor | Mapping[str, Tensor]]) -> str:
    """Return a digest of the calibration set's tokens, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()) if isinstance(batch, Mapping) else [("input_ids", batch)]:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
