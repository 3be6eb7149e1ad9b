"""Imports go to a lower layer only, read off the syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "errors": 0,
    "malloc": 0,
    "signals": 0,
    "discovery": 0,
    "options": 0,
    "internals": 0,
    "ops": 1,
    "scorers": 1,
    "allocators": 1,
    "solvers": 1,
    "models": 2,
    "calibration": 2,
    "sharding": 2,
    "checkpoint": 2,
    "runtime": 2,
    "recipes": 2,
    "testing": 2,
    "pruning": 3,
    "reporting": 3,
    "training": 4,
    "callbacks": 4,
    "arguments": 5,
    "commands": 5,
    "cli": 5,
    "cli_errors": 5,
    "trainer": 5,
    "__main__": 5,
}
APART = [{"scorers", "allocators", "solvers"}, {"pruning", "reporting"}, {"training", "callbacks"}]
"""Neighbours within a layer that never import each other, except ..."""
SHARED = "lit_prune.reporting.report."
"""... the data of a report, which a run fills in and people read."""
FILES = [*sorted((ROOT / "lit_prune").rglob("*.py")), *sorted((ROOT / "callbacks").rglob("*.py"))]


def part_of(file: Path) -> str:
    if file.is_relative_to(ROOT / "callbacks"):
        return "callbacks"
    return file.relative_to(ROOT / "lit_prune").parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    return [file for file in FILES if part_of(file) != "__init__"]


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_what_its_layer_may(file: Path) -> None:
    part = part_of(file)
    for name in imported(file):
        top, *rest = name.split(".")
        if top == "lit_prune" and rest and not name.startswith(SHARED):
            assert LAYERS[rest[0]] <= LAYERS[part], f"{file} imports {name}, a higher layer"
            for group in APART:
                assert rest[0] == part or not {rest[0], part} <= group, f"{file} imports {name}, a neighbour"
            assert part != "ops" or rest[0] in ("ops", "errors"), f"{file} imports {name}"
        if top in ("lightning", "pytorch_lightning"):
            assert LAYERS[part] >= 4, f"{file} imports {name}"
        if top == "transformers":
            assert LAYERS[part] == 2 or part == "training", f"{file} imports {name}"


def test_every_part_has_a_layer() -> None:
    assert {part_of(file) for file in files()} == set(LAYERS)


def test_the_order_of_layers_would_be_enforced(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import torch\nfrom lit_prune.pruning.plan import PruningPlan as P, x\n")
    assert list(imported(file)) == ["torch", "lit_prune.pruning.plan.PruningPlan", "lit_prune.pruning.plan.x"]
