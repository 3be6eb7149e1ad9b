"""Text for calibration or training that a model samples, once: it is cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from torch import Tensor

from lit_prune.checkpoint.files import load_tensors, save_tensors
from lit_prune.checkpoint.fingerprints import model_fingerprint
from lit_prune.errors import DiskError, InputError, damage, first_line
from lit_prune.models.generate import sample_sequences
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer


def generated_sequences(
    pretrained: str, dtype: torch.dtype | None, trust_remote_code: bool, sequences: int, seqlen: int, seed: int
) -> Tensor:
    """Return text that a model samples, as token ids ``[sequences, seqlen]`` (int64), from the cache if it is there.

    The cache is the folder ``lit-prune`` beside the hub's, ``~/.cache/huggingface`` unless ``HF_HOME`` is set. The
    model is loaded for the sampling, and released.

    Args:
        pretrained: hub name, folder or GGUF file of the model.
        dtype: dtype of its weights; None = as stored.
        trust_remote_code: run code that comes with the model.
        sequences: number of sequences.
        seqlen: tokens per sequence.
        seed: seed of the sample.

    Raises:
        InputError: if the model cannot be loaded, or is random, or the cache is damaged or cannot be written.
        NumericalError: if its logits are NaN or infinite.
    """
    if pretrained == "random":
        raise InputError("model.pretrained is 'random': such a model has no text to write")
    model = load_model(pretrained, dtype, trust_remote_code=trust_remote_code).eval()
    special = load_tokenizer(pretrained, trust_remote_code).all_special_ids
    settings = f"{model_fingerprint(model)} {sorted(special)} {sequences} {seqlen} {seed} {torch.__version__}"
    path = Path(constants.HF_HOME) / "lit-prune" / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
    with _locked(path):  # one of several processes samples, the others wait and read
        if not path.is_file():
            if device := torch.accelerator.current_accelerator(check_available=True):
                model = model.to(device)
            save_tensors(path, {"tokens": sample_sequences(model, special, sequences, seqlen, seed)})
        return _read(path, (sequences, seqlen))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise DiskError(
            f"the text is 'generated': it cannot be stored in {str(path.parent)!r} "
            f"({first_line(error)}); set HF_HOME to a folder that can be written"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read(path: Path, shape: tuple[int, int]) -> Tensor:
    """Return the token ids in a file of the cache."""
    try:
        tokens = load_tensors(path)["tokens"]
    except (InputError, KeyError) as error:
        raise InputError(f"the text is 'generated': {damage(error)}; delete {str(path)!r}") from error
    if tokens.shape != shape or tokens.dtype != torch.int64:
        raise InputError(
            f"the text is 'generated': {str(path)!r} holds {tokens.dtype} of the shape {list(tokens.shape)} in "
            "place of the tokens: delete it"
        )
    return tokens
