"""Suppress messages of the Hugging Face libraries and of DeepSpeed, which they import."""

from __future__ import annotations

import logging
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
def _quiet(library: ModuleType) -> Iterator[None]:
    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


def hide_choice_of_accelerator() -> None:
    """Hide DeepSpeed's warning that it found no GPU, which it logs on import, also if it is not used."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to" not in record.getMessage())


def disable_model_progress_bars() -> None:
    """Disable the progress bars of transformers on loading and saving models."""
    transformers_logging.disable_progress_bar()
