"""The one exception type that means: the user can put this right."""

from __future__ import annotations


class InputError(ValueError):
    """A value that cannot work. The message names it, says where it came from and what would be right."""


class DiskError(InputError):
    """A file that cannot be written, for want of space or permission."""


class NumericalError(ArithmeticError):
    """Arithmetic that broke down (a singular Gram matrix, NaN activations). The message holds the numbers."""


def damage(error: BaseException) -> str:
    """Return in a few words why content could not be read: a missing key, or the first line of the message."""
    return f"{error} is missing" if isinstance(error, KeyError) else first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, to quote in a message of our own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
