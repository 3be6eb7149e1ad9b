"""Calibration text that the dense model writes itself, sampled once and cached."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from torch import Tensor

from lit_prune.checkpoint.files import load_tensors, save_tensors
from lit_prune.checkpoint.fingerprints import model_fingerprint
from lit_prune.errors import InputError
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
        InputError: if the model cannot be loaded, or is random.
        NumericalError: if its logits are NaN or infinite.
    """
    if pretrained == "random":
        raise InputError("model.pretrained is 'random': such a model has no text to write")
    model = load_model(pretrained, dtype, trust_remote_code=trust_remote_code).eval()
    special = load_tokenizer(pretrained, trust_remote_code).all_special_ids
    settings = f"{model_fingerprint(model)} {sorted(special)} {sequences} {seqlen} {seed} {torch.__version__}"
    path = Path(constants.HF_HOME) / "lit-prune" / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one of several processes samples, the others wait and read
        if not path.is_file():
            if torch.cuda.is_available():
                model = model.cuda()
            save_tensors(path, {"tokens": sample_sequences(model, special, sequences, seqlen, seed)})
        return load_tensors(path)["tokens"]
