"""The wheel holds what is on disk, and importing the maths imports nothing heavy."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import lit_prune

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"  # what an earlier build left beside the sources would be packed as well
    others = shutil.ignore_patterns(".*", "build", "out", "tests", "docs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=others, symlinks=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_prune").rglob("*.py")}
    callbacks = {f"lit_prune/callbacks/{p.relative_to(ROOT / 'callbacks')}" for p in (ROOT / "callbacks").rglob("*.py")}
    configs = {f"lit_prune/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    written_help = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_prune" / "help").glob("*.txt")}
    assert len(configs) > 20 and len(written_help) == 8
    templates = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_prune" / "reporting" / "templates").iterdir()}
    kernels = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_prune" / "runtime" / "kernels").iterdir()}
    assert packed == library | callbacks | configs | written_help | templates | kernels | {"lit_prune/py.typed"}


def test_the_maths_import_no_lightning_and_no_transformers() -> None:
    program = (
        "import sys, lit_prune, lit_prune.ops, lit_prune.scorers, lit_prune.solvers, lit_prune.allocators\n"
        "print([m for m in ('lightning', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_pruning_as_a_library_imports_no_lightning() -> None:
    program = "import sys, lit_prune; lit_prune.prune, lit_prune.PruningPlan; print('lightning' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


def declared(requirements: list[str]) -> set[str]:
    """Return the names of the distributions, spelled as packaging compares them."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower() for requirement in requirements}  # type: ignore[index]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = declared(PROJECT["dependencies"])
OPTIONAL = declared([name for extra in PROJECT["optional-dependencies"].values() for name in extra])


def test_the_constraints_pin_everything_that_is_required() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert (REQUIRED | OPTIONAL) - declared([line for line in lines if "==" in line]) == set()


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the third-party modules that the statements import."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    return {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"lit_prune"}


@pytest.mark.parametrize("everywhere", [False, True], ids=["at the top", "everywhere"])
def test_what_is_imported_is_declared(everywhere: bool) -> None:
    files = [*(ROOT / "lit_prune").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    # A kernel is decorated when its module is imported, which another module does within a function.
    files = [file for file in files if everywhere or file.name != "triton_kernel.py"]
    trees = [ast.parse(file.read_text()) for file in files]
    modules = imported(node for tree in trees for node in (ast.walk(tree) if everywhere else iter(tree.body)))
    assert {"torch", "yaml"} < modules
    distributions = packages_distributions()
    allowed = REQUIRED | OPTIONAL if everywhere else REQUIRED
    undeclared = {module for module in modules if not declared(distributions.get(module, [module])) & allowed}
    assert undeclared == set()


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert lit_prune.__version__ == newest[1] == citation["version"]


def test_the_readme_names_the_versions_that_are_tested() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(("| versions |", "| highest |", "| lowest |"))
    ]
    (_, _, *names), (_, _, *highest), (_, python, *lowest) = rows
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert highest == [pinned[name] for name in names]
    requirements = [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]
    floors = dict(re.split(r"\[.*\]>=|>=", requirement) for requirement in requirements if ">=" in requirement)
    assert PROJECT["requires-python"] == f">={python}"
    for name, version in zip(names, lowest, strict=True):
        assert f"{version}.".startswith(f"{floors[name]}."), name


def test_the_command_prints_the_version_without_importing_torch() -> None:
    module, function = PROJECT["scripts"]["lit-prune"].split(":")
    program = (
        f"import sys; sys.argv[1:] = ['--version']; from {module} import {function}; print({function}())\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"lit-prune {lit_prune.__version__}", "0", "False"]


def test_workflows_name_files_that_exist() -> None:
    named = {
        path
        for file in (ROOT / ".github" / "workflows").glob("*.yml")
        for job in yaml.safe_load(file.read_text())["jobs"].values()
        for step in job["steps"]
        for path in re.findall(r"bash (\S+)", step.get("run", ""))
    }
    assert named == {"scripts/test.sh"}
    assert all((ROOT / path).is_file() for path in named)
