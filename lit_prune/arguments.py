"""Preprocessing of command-line arguments: names of shipped files, defaults, flags and overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import yaml

from lit_prune.errors import InputError, first_line
from lit_prune.recipes import PLANS, find, shipped

_FLAGS = {"--overwrite": "true", "--trust": "true", "--resume": "auto"}
"""Values of options that are given without a value."""
_DEFAULT_PLANS = {"prune": "best", "analyze": "alphapruning"}
_DEFAULT_NM_PLAN = "best_nm"
_SHORT = {"--sparsity": "--plan.pattern.sparsity", "--pattern": "--plan.pattern"}
_CHANGES_A_PLAN = re.compile(r"--plan\.(?![\w.]*\bhelp\b)")
_CALLBACK_OVERRIDE = re.compile(r"--trainer\.callbacks\.(?P<callback>[A-Z]\w*)\.(?P<key>[\w.]+)(=(?P<value>.*))?", re.S)
_OLD_PLAN = re.compile(r"--trainer\.callbacks\.(init_args\.)?(plan|schedule)\b")
_N_OF_M = re.compile(r"(?P<keep>\d+)(?::|of)(?P<of>\d+)")


@dataclass
class Prepared:
    """Arguments for the parser, with the overrides and notes to handle in addition."""

    arguments: list[str]
    overrides: list[tuple[str, str, str]] = field(default_factory=list)
    """Callback, key and value of each ``--trainer.callbacks.CALLBACK.KEY VALUE``."""
    notes: list[str] = field(default_factory=list)
    """Notes on the configuration to print."""


def prepare(arguments: Sequence[str]) -> Prepared:
    """Replace the names of shipped files by their paths, add the default plan, and extract the overrides.

    Raises:
        InputError: if a name is unknown, or if parts of a plan are changed but no plan is given.
    """
    prepared, configs, last = Prepared([]), [], []
    rest = iter(_with_flags(arguments))
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in ("-c", "--config"):
            path = find("config", _value(option, equals, value, rest))
            configs.append(_peek(path))
            prepared.arguments += ["--config", path]
        elif option == "--plan":
            # A named plan replaces an earlier one completely.
            prepared.arguments += ["--plan=null", f"--plan={plan_value(_value(option, equals, value, rest))}"]
        elif option in _SHORT:
            last.append(f"{_SHORT[option]}={pattern_value(_value(option, equals, value, rest))}")
        elif option == "--plan.pattern":
            prepared.arguments.append(f"{option}={pattern_value(_value(option, equals, value, rest))}")
        elif match := _CALLBACK_OVERRIDE.fullmatch(argument):
            given = match["value"] if match["value"] is not None else _value(option, "", "", rest)
            if place := _place_behind_addition(prepared.arguments, match["callback"]):
                prepared.arguments.insert(place, f"--trainer.callbacks.{match['key']}={given}")
            else:
                prepared.overrides.append((match["callback"], match["key"], given))
        else:
            prepared.arguments.append(argument)
    _check_old_overrides(arguments)
    prepared.arguments += sorted(last)  # the pattern before its sparsity
    prepared.notes += _dropped(configs)
    _add_default_plan(prepared.arguments, configs)
    return prepared


def plan_value(value: str) -> str:
    """Return the value of ``--plan`` for the parser: a path for a name; a mapping or null unchanged."""
    return value if value == "null" or value.lstrip().startswith("{") else find("plan", value)


def pattern_value(value: str) -> str:
    """Return the value of a pattern for the parser: a class with its arguments for ``2:4`` and ``2of4``."""
    if match := _N_OF_M.fullmatch(value):
        return f'{{"class_path": "NM", "init_args": {{"keep": {match["keep"]}, "of": {match["of"]}}}}}'
    return value


def overridden(callbacks: list[dict[str, Any]], overrides: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Return ``trainer.callbacks`` with ``overrides`` applied, each to the first callback of its class.

    Raises:
        InputError: if there is no callback of a class, or if it has no such argument.
    """
    for name, key, value in overrides:
        found = [entry for entry in callbacks if entry["class_path"].rpartition(".")[2] == name]
        if not found:
            there = ", ".join(entry["class_path"].rpartition(".")[2] for entry in callbacks) or "none"
            raise InputError(
                f"--trainer.callbacks.{name}.{key}: trainer.callbacks has no {name}, only {there}; add it first, with "
                f"--trainer.callbacks+={name}"
            )
        place = found[0].setdefault("init_args", {})
        *path, last = key.removeprefix("init_args.").split(".")
        try:
            for step in path:
                inner = place[step] if place.get(step) is not None else {}
                place[step] = inner
                place = inner
                place = place.setdefault("init_args", {}) if "class_path" in place else place
            place[last] = yaml.safe_load(value)
        except (AttributeError, TypeError, yaml.YAMLError) as error:
            raise InputError(
                f"--trainer.callbacks.{name}.{key} cannot be {value!r} ({first_line(error)}); see "
                f"--trainer.callbacks.help {name}"
            ) from error
    return callbacks


def _place_behind_addition(arguments: Sequence[str], callback: str) -> int | None:
    """Return the place for an argument of a callback that the command line adds; None if it adds no such callback.

    The parser takes ``--trainer.callbacks.KEY`` for an argument of the callback that was added last, and refuses one
    whose required arguments do not follow.
    """
    addition = re.compile(rf"--trainer\.callbacks\+=([\w.]+\.)?{callback}")
    place = max((i + 1 for i, argument in enumerate(arguments) if addition.fullmatch(argument)), default=None)
    while place and place < len(arguments) and arguments[place].startswith("--trainer.callbacks."):
        place += 1
    return place


def _value(option: str, equals: str, value: str, rest: Iterator[str]) -> str:
    given = value if equals else next(rest, None)
    if given is None:
        raise InputError(f"{option} has no value: give one after it")
    return given


def _with_flags(arguments: Sequence[str]) -> list[str]:
    """Expand flags without a value: ``--overwrite`` to ``--overwrite=true``, ``--resume`` to ``--resume=auto``."""
    following = [*arguments[1:], ""][: len(arguments)]
    return [
        f"{argument}={_FLAGS[argument]}" if argument in _FLAGS and (not value or value.startswith("-")) else argument
        for argument, value in zip(arguments, following, strict=True)
    ]


def _peek(path: str) -> Any:
    """Return the content of a configuration; None if it cannot be read, which the parser reports later."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _callbacks(config: Any) -> list[str] | None:
    """Return the class names of a configuration's ``trainer.callbacks``; None if it does not set them."""
    trainer = config.get("trainer") if isinstance(config, dict) else None
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if not isinstance(callbacks, list):
        return None
    paths = [entry.get("class_path") if isinstance(entry, dict) else entry for entry in callbacks]
    return [str(path).rpartition(".")[2] for path in paths]


def _dropped(configs: Sequence[Any]) -> list[str]:
    """Return notes on callbacks of a configuration that a later configuration replaces."""
    lists = [names for config in configs if (names := _callbacks(config)) is not None]
    return [
        f"trainer.callbacks of a later --config replaces that of an earlier one: {', '.join(lost)} dropped"
        for before, after in pairwise(lists)
        if (lost := [name for name in before if name not in after])
    ]


def _check_old_overrides(arguments: Sequence[str]) -> None:
    """Raise ``InputError`` for options of the ``Prune`` callback unless the command line adds one itself."""
    old = next((argument for argument in arguments if _OLD_PLAN.match(argument)), None)
    if old and not any(map(_adds_prune, arguments)):
        new = _OLD_PLAN.sub(r"--\2", old).partition("=")[0]
        raise InputError(f"{old.partition('=')[0]} is an option of its own by now: {new}")


def _add_default_plan(arguments: list[str], configs: Sequence[Any]) -> None:
    """Insert the default plan first if none is given, so that all other arguments can change it."""
    command = arguments[0] if arguments else ""
    changes = [argument.partition("=")[0] for argument in arguments if _CHANGES_A_PLAN.match(argument)]
    prunes = any("Prune" in (_callbacks(config) or ()) for config in configs) or any(map(_adds_prune, arguments))
    if prunes and changes:
        raise InputError(
            f"{changes[0]} changes an option that is not there: trainer.callbacks has a Prune with its own plan; give "
            "the plan as an option, in place of Prune"
        )
    if prunes or any(argument.startswith("--plan=") for argument in arguments):
        return
    if any(isinstance(config, dict) and config.get("plan") for config in configs):
        return
    if command in _DEFAULT_PLANS:
        n_of_m = command == "prune" and any(a.startswith("--plan.pattern=") and '"NM"' in a for a in arguments)
        name = _DEFAULT_NM_PLAN if n_of_m else _DEFAULT_PLANS[command]
        arguments.insert(1, f"--plan={find('plan', name)}")
    elif command == "fit" and changes:
        names = [item.name.removeprefix(f"{PLANS}/") for item in shipped() if item.name.startswith(PLANS)]
        raise InputError(
            f"{changes[0]} changes a plan, and none is given: name one with --plan, such as {', '.join(names)}"
        )


def _adds_prune(argument: str) -> bool:
    return argument.startswith("--trainer.callbacks") and "Prune" in argument
