"""Locate a model on the hub, in a folder or in a file; explain why it cannot be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from yaml import YAMLError

from lit_prune.checkpoint.folders import check_folder, check_no_adapter
from lit_prune.errors import InputError, first_line
from lit_prune.models.quiet import quiet_hub

RANDOM = "random"
"""Value of ``pretrained`` that builds a model from a config, with random weights and a byte-level tokenizer."""
_LARGEST_CARD = 10**6
_LICENSE = re.compile(r"[\w.+-]{1,64}")
"""Licence identifier of the hub, such as ``apache-2.0``."""
MODEL_REMEDY = (
    "give a local folder, a .gguf file, or the name of a causal language model on a hub that this machine can reach"
)


def hub_model(pretrained: str) -> str | None:
    """Return the name of a model on the hub; None for a file, a folder or random weights."""
    try:
        return None if pretrained == RANDOM or Path(pretrained).expanduser().exists() else pretrained
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"model.pretrained is {pretrained[:200]!r}, which cannot be a name: {MODEL_REMEDY}") from error


def license_of(pretrained: str) -> str | None:
    """Return the licence named in the model card in a local folder; None if it is missing or unreadable."""
    card = Path(pretrained).expanduser() / "README.md"
    if hub_model(pretrained) is not None or not card.is_file() or card.stat().st_size > _LARGEST_CARD:
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, YAMLError):
        return None  # an unreadable model card is not an error
    return found if isinstance(found, str) and _LICENSE.fullmatch(found) else None


def locate(pretrained: str) -> tuple[str, dict[str, str]]:
    """Return the arguments of ``from_pretrained`` for a GGUF file, a folder or a hub name."""
    path = Path(pretrained).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"model.pretrained is {pretrained!r}: a file must be a .gguf file; give the model's folder"
            )
        check_no_adapter(path.parent, pretrained)  # transformers would load the model that the adapter names
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        check_folder(path, pretrained)
        return str(path), {}
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
        raise InputError(f"model.pretrained is {pretrained!r}: there is no such file or folder")
    return pretrained, {}


@contextmanager
def asked_as(option: str) -> Iterator[None]:
    """Name the ``option`` of a model or tokenizer instead of ``model.pretrained`` in an ``InputError``."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("model.pretrained is", f"{option} is", 1)) from error


@contextmanager
def explained(pretrained: str, remedy: str = MODEL_REMEDY) -> Iterator[None]:
    """Convert errors of transformers on loading a model to a one-line ``InputError`` that ends with ``remedy``."""
    try:
        with quiet_hub():
            yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"model.pretrained is {pretrained!r}: {first_line(error)}") from error
    except UnpicklingError as error:
        raise InputError(
            f"model.pretrained is {pretrained!r}: its weights hold more than tensors, so they may run code, and are "
            "not loaded; give a model in safetensors files"
        ) from error
    except StrictDataclassError as error:  # its message has a second line, with the reason
        raise InputError(
            f"model.pretrained is {pretrained!r}: its config has an invalid value ({' '.join(str(error).split())}); "
            "correct it, or download the model again"
        ) from error
    except Exception as error:  # transformers and tokenizers raise various types
        raise InputError(
            f"model.pretrained is {pretrained!r}: it cannot be loaded ({first_line(error)}); {remedy}"
        ) from error
