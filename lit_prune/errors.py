"""Exception types; ``InputError`` is for errors that the user can correct."""

from __future__ import annotations


class InputError(ValueError):
    """An invalid value. The message states the value, its source, and a valid alternative."""


class DiskError(InputError):
    """A file that cannot be written, for lack of space or permission."""


class NumericalError(ArithmeticError):
    """A numerical failure (a singular Gram matrix, NaN activations). The message contains the numbers."""


def damage(error: BaseException) -> str:
    """Return a short reason why content could not be read: a missing key, or the first line of the message."""
    return f"{error} is missing" if isinstance(error, KeyError) else first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, to quote in another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
