"""The embedded text tokenised once in a process: hundreds of tests read it, and nearly all with the byte tokenizer."""

from torch import Tensor

from lit_prune.training import TextDataModule

_LONG = 10_000
"""Characters; shorter texts are those that a test has written."""
_encode = TextDataModule._encode
_known: dict[tuple[str, str], Tensor] = {}


def _encode_once(data: TextDataModule, text: str) -> Tensor:
    backend = getattr(data._tokenizer, "backend_tokenizer", None)
    if len(text) <= _LONG or backend is None:
        return _encode(data, text)
    key = backend.to_str(), text
    if key not in _known:
        _known[key] = _encode(data, text)
    return _known[key].clone()


TextDataModule._encode = _encode_once  # type: ignore[method-assign]
