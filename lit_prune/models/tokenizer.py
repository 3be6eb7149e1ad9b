"""Load the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_prune.checkpoint.folders import TOKENIZER_FILES, check_tokenizer_files
from lit_prune.models.gguf import check_gguf
from lit_prune.models.locate import MODEL_REMEDY, RANDOM, explained, hub_model, locate

_REMEDY = "correct its config.json, or copy the files of its tokenizer into the folder"


def load_tokenizer(pretrained: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``pretrained`` (a byte tokenizer for ``random``)."""
    if pretrained == RANDOM:
        return byte_tokenizer()
    remedy = _REMEDY if hub_model(pretrained) is None else MODEL_REMEDY
    with explained(pretrained, remedy):
        location, extra = locate(pretrained)
        if hub_model(pretrained) is not None:
            files = snapshot_download(pretrained, allow_patterns=[*TOKENIZER_FILES, "*.json"])
            check_tokenizer_files(Path(files))
        elif extra:
            check_gguf(Path(pretrained).expanduser(), pretrained)
        else:
            check_tokenizer_files(Path(location))
        return AutoTokenizer.from_pretrained(location, **extra, trust_remote_code=trust_remote_code)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with 256 bytes and an end-of-text token, for models with random weights."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
