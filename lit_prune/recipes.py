"""Configuration files shipped with the package, found by name: ``recipes/recover``, ``plans/wanda``."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from lit_prune.errors import InputError

_FOLDER = Path(str(files("lit_prune"))) / "configs"
_LONGEST = 200
"""Maximum number of characters of a name in a message."""
PLANS = "plans"
"""Folder of pruning plans, which are values of ``--plan``; all other files are values of ``--config``."""


@dataclass(frozen=True)
class Shipped:
    """A configuration file shipped with the package."""

    name: str
    """Name of the file, such as ``recipes/recover``."""
    summary: str
    """Summary of the file: its first line, a comment."""
    path: Path


def shipped() -> list[Shipped]:
    """Return all shipped files, sorted by name."""
    found = [(path.relative_to(_FOLDER).with_suffix("").as_posix(), path) for path in _FOLDER.rglob("*.yaml")]
    return [Shipped(name, _summary(path), path) for name, path in sorted(found)]


def find(option: str, name: str) -> str:
    """Return the path of a file given by name or path.

    Args:
        option: option that names the file: ``plan`` or ``config``.
        name: a path, or the name of a shipped file, with or without its folder.

    Raises:
        InputError: if there is no such file.
    """
    try:
        if Path(name).expanduser().is_file():
            return name
    except (OSError, RuntimeError):  # not a valid file name, or "~user" of an unknown user
        pass
    if path := path_of(option, name):
        return path
    names = _names(option)
    near = dict.fromkeys(names[found] for found in get_close_matches(name, names, n=3))
    hint = f"did you mean {' or '.join(near)}?" if near else "lit-prune recipes lists the names that ship"
    raise InputError(
        f"--{option} is {name[:_LONGEST]!r}: there is no such file, and no configuration of that name; {hint}"
    )


def path_of(option: str, name: str) -> str | None:
    """Return the path of the shipped file of a name; None if there is none."""
    full = _names(option).get(name)
    return full and str(_FOLDER / f"{full}.yaml")


def _names(option: str) -> dict[str, str]:
    """Return the full name of each name that an option accepts, with and without its folder."""
    names = [item.name for item in shipped() if item.name.startswith(f"{PLANS}/") == (option == "plan")]
    return {short: name for name in names for short in (name.partition("/")[2], name)}


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
