"""Configuration files that ship with the package, found by name: ``recipes/recover``, ``plans/wanda``."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from lit_prune.errors import InputError

_FOLDER = Path(str(files("lit_prune"))) / "configs"
_LONGEST = 200
"""Characters of a name that are shown."""
PLANS = "plans"
"""The folder of pruning plans: values of ``--plan``. All other files are values of ``--config``."""


@dataclass(frozen=True)
class Shipped:
    """A file that ships."""

    name: str
    """Its name, such as ``recipes/recover``."""
    summary: str
    """Its first line, a comment."""
    path: Path


def shipped() -> list[Shipped]:
    """Return all files that ship, by name."""
    found = [(path.relative_to(_FOLDER).with_suffix("").as_posix(), path) for path in _FOLDER.rglob("*.yaml")]
    return [Shipped(name, _summary(path), path) for name, path in sorted(found)]


def find(option: str, name: str) -> str:
    """Return the path of the file that a name or a path stands for.

    Args:
        option: which names the file: ``plan``, or ``config``.
        name: a path; or a name as ``shipped`` gives it, whose folder may be left out.

    Raises:
        InputError: if there is no such file.
    """
    try:
        if Path(name).expanduser().is_file():
            return name
    except (OSError, RuntimeError):  # no file can have the name, or it begins with a user that nobody is
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
    """Return the path of the file that ships under a name, or None."""
    full = _names(option).get(name)
    return full and str(_FOLDER / f"{full}.yaml")


def _names(option: str) -> dict[str, str]:
    """Return the names that an option takes, with and without their folder, and the full name of each."""
    names = [item.name for item in shipped() if item.name.startswith(f"{PLANS}/") == (option == "plan")]
    return {short: name for name in names for short in (name.partition("/")[2], name)}


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
