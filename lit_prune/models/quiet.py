"""Keep messages of the Hugging Face libraries off the screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quiet_hub() -> AbstractContextManager[None]:
    """Keep the hub client's retry messages off the screen; an error is raised all the same."""
    return _quiet(hub_logging)


def quiet_transformers() -> AbstractContextManager[None]:
    """Keep the warnings of transformers off the screen."""
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
    """Load and save models without a progress bar of transformers'."""
    transformers_logging.disable_progress_bar()
