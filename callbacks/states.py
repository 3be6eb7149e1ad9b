"""Callback states from untrusted checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback

from lit_prune.errors import InputError, damage


@contextmanager
def restoring(callback: Callback) -> Iterator[None]:
    """Convert errors from restoring a damaged state into an ``InputError`` that names the callback."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the checkpoint's state of {type(callback).__name__} is damaged ({damage(error)})") from error
