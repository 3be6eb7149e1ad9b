"""Suppress messages of the Hugging Face libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quiet_hub() -> AbstractContextManager[None]:
    """Suppress the retry messages of the hub client; errors are still raised."""
    return _quiet(hub_logging)


def quiet_transformers() -> AbstractContextManager[None]:
    """Suppress the warnings of transformers."""
    return _quiet(transformers_logging)


@contextmanager
def _quiet(logging: ModuleType) -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def disable_model_progress_bars() -> None:
    """Disable the progress bars of transformers on loading and saving models."""
    transformers_logging.disable_progress_bar()
