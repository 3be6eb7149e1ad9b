"""The embedded text tokenised once in a process: hundreds of tests read it, always with the byte tokenizer."""

from functools import cache

from torch import Tensor

from lit_prune.training import TextDataModule

_LONG = 10_000
"""Characters; shorter texts are those that a test has written."""
_encode = TextDataModule._encode
_texts = TextDataModule(tokenizer="random")


@cache
def _tokens(text: str) -> Tensor:
    return _encode(_texts, text)


def _encode_once(data: TextDataModule, text: str) -> Tensor:
    return _tokens(text).clone() if data.tokenizer == "random" and len(text) > _LONG else _encode(data, text)


TextDataModule._encode = _encode_once  # type: ignore[method-assign]
