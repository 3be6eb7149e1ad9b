"""The wheel holds what is on disk, and importing the maths imports nothing heavy."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_prune").rglob("*.py")}
    callbacks = {f"lit_prune/callbacks/{p.relative_to(ROOT / 'callbacks')}" for p in (ROOT / "callbacks").rglob("*.py")}
    assert packed == library | callbacks | {"lit_prune/py.typed"}


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


def test_the_constraints_pin_everything_that_is_required() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = project[project.index("dependencies = [") : project.index("[project.scripts]")]
    required = {re.split(r"[\[>=<]", name)[0].lower() for name in re.findall(r'"([A-Za-z][^"]*)"', section)}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert required - pinned == set()
