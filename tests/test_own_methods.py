"""A method that is no part of the package: named on the command line, and checked with ``lit_prune.testing``."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from lit_prune.__main__ import OwnModules, main
from lit_prune.checkpoint.save import save_pruned
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from support.processes import run
from support.scripts import run_script

TINY = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = ["--data.dataset", "embedded", "--data.sequences", "2", "--data.seqlen", "32", "--data.max_windows", "2"]
PAGE = Path(__file__).parents[1] / "docs" / "guides" / "extend.md"
PROGRAM = Path(sys.executable).parent / "lit-prune"
"""The command as it is installed, which does not put the working directory first on the path."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, and the module of the documentation."""
    folder = tmp_path_factory.mktemp("place")
    model = load_model("random", config={**TINY, "intermediate_size": 48})
    save_pruned(folder / "model", model, load_tokenizer("random"), {}, {})
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (folder / "my_module.py").write_text(code)
    return folder


def test_a_class_in_the_working_directory_is_named_by_its_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    own = ["--plan.scorer", "my_module.Activation", "--plan.scorer.power", "2", "--plan.solver", "SparseGPT"]
    command = ["prune", "--model.pretrained", "model", *SMALL, "--trainer.accelerator", "cpu", *own]
    ended = run_script(place / "log", PROGRAM, *command, "--output", "out")
    assert ended.code == 0, ended.said
    plan = json.loads((place / "out" / "pruning.json").read_text())["plan"]
    assert plan["scorer"] == {"class_path": "my_module.Activation", "init_args": {"power": 2.0}}


def test_the_module_checks_itself(place: Path) -> None:
    ended = run_script(place / "log", place / "my_module.py")
    assert ended.code == 0, ended.said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_module.Missing", "plan: PruningPlan: scorer: my_module.Missing: module 'my_module' has no attribute"),
        ("my_module.LayerStats", "plan: PruningPlan: scorer: Import path does not correspond to a subclass of Scorer"),
    ],
)
def test_what_is_no_scorer_is_refused_in_one_line(name: str, message: str, place: Path) -> None:
    command = ["prune", "--model.pretrained", "model", "--plan", "wanda", "--plan.scorer", name, "--output", "none"]
    ended = run(place / "log", partial(main, command), place)
    assert ended.code == 2 and message in ended.last_line and "Traceback" not in ended.said
    assert not (place / "none").exists()


def test_a_model_that_one_stands_in_runs_no_code_and_no_library_warns(place: Path) -> None:
    # Libraries look for these, which are seldom installed.
    for name in ("opt_einsum", "uarray", "pynvml", "gmpy", "my_config"):
        (place / "model" / f"{name}.py").write_text(f"open({str(place / 'ran')!r}, 'a').write({name!r})")
    command = [PROGRAM, "prune", "--model.pretrained", ".", "--plan", "magnitude", "--output", "../out2", *SMALL]
    result = subprocess.run(command, cwd=place / "model", capture_output=True, text=True, check=False)
    assert not (place / "ran").exists(), (place / "ran").read_text()
    assert result.returncode == 0, result.stderr
    assert "warning" not in (result.stdout + result.stderr).lower()


def test_own_modules_are_named_in_a_configuration_and_import_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "plan.yaml").write_text("scorer: {class_path: lit_prune_own.Scorer}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.yaml").write_text("plan: part.yaml\n")
    (tmp_path / "runs" / "part.yaml").write_text("solver: lit_prune_nested.Solver\n")
    (tmp_path / "pruning.json").write_text('{"layers": "lit_prune_data.Scorer"}')
    command = ["prune", "--plan=plan.yaml", "--model.optimizer", "lit_prune_other.Optimizer", "-c", "runs/run.yaml"]
    finder = OwnModules([*command, "--plan.allocator.path", "pruning.json"])
    for name in ("lit_prune_own", "lit_prune_other", "lit_prune_third", "lit_prune_nested", "lit_prune_data"):
        (tmp_path / f"{name}.py").touch()
    for name in ("lit_prune_third", "lit_prune_data"):  # one is not named, the other in data
        assert finder.find_spec(name, None) is None and str(tmp_path) not in sys.path
    assert finder.find_spec("lit_prune_nested", None)
    assert finder.find_spec("lit_prune_own", None) and str(tmp_path) in sys.path
    assert finder.find_spec("lit_prune_other", None)


def test_a_working_directory_that_is_gone_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert OwnModules(["prune", "--plan.scorer", "my_module.Scorer"]).find_spec("my_module", None) is None
