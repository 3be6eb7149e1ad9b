"""The documentation site builds, and what it tells people to type is understood."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from lit_prune import recipes
from lit_prune.__main__ import main
from lit_prune.checkpoint.save import save_pruned
from lit_prune.cli import build
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from support.shared import Shared

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, text) of every code block in a language."""
    return [
        (str(page.relative_to(ROOT)), match[2])
        for page in PAGES
        for match in _BLOCK.finditer(page.read_text())
        if match[1] == language
    ]


def commands(page: str) -> list[str]:
    """Return the ``lit-prune`` commands of a page, in order."""
    lines = [line for where, text in blocks("bash") if where == page for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("lit-prune ") and "strategies/" not in line]


WITH_COMMANDS = [page for page in dict.fromkeys(page for page, _ in blocks("bash")) if commands(page)]
SMALL = ["--data.dataset", "embedded", "--data.sequences", "2", "--data.seqlen", "32", "--data.max_windows", "2"]
QUICK = ["--trainer.logger", "false", "--prompts", "[]"]
"""Options of ``prune`` that leave out what no page speaks of."""
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SHORTER = {
    r"max_steps: \d+": "max_steps: 2",
    r"val_check_interval: \d+": "val_check_interval: 1",
    r"end: 300, every: 50": "end: 2, every: 1",
    r"(seqlen|sequences): \d+": r"\1: 16",
}
"""What makes the runs of ``configs/`` last seconds."""

_SHORT_TRAINING = re.compile(r"max_steps=(\d+)0\b")
"""The trainings of a notebook, a tenth as long in the tests."""


@pytest.mark.timeout(300)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "methods" / "wanda" / "index.html").read_text()
    assert "class_path" in page and ".. code-block" not in page
    for file in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)"', file.read_text()), file


@pytest.fixture(scope="session")
def workplace(shared: Shared, write_task: Callable[[Path], Path]) -> Path:
    """Return a folder with all that the pages' commands ask for: configs, a model, pruned ones, a checkpoint, tasks."""
    return shared.once("workplace", partial(fill, write_task=write_task))


def fill(place: Path, write_task: Callable[[Path], Path]) -> None:
    shutil.copytree(ROOT / "configs", place / "configs")
    for config in (place / "configs").rglob("*.yaml"):
        text = config.read_text()
        for pattern, shorter in SHORTER.items():
            text = re.sub(pattern, shorter, text)
        config.write_text(text)
    model = load_model("random", config={"model_type": "llama", **TINY})
    save_pruned(place / "out" / "smollm2-135m", model, load_tokenizer("random"), {}, {})
    (place / "README.md").write_text("Some text.\n" * 20)
    write_task(place / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(recipes, "_FOLDER", place / "configs")
        for pruned in ("sparse-model", "other-model", "out/demo"):
            assert main(["prune", "-c", "recipes/demo", *SMALL, *QUICK, "--output", pruned]) == 0
        assert main(["fit", "-c", "recipes/gradual", *SMALL, "--trainer.callbacks+=ModelCheckpoint"]) == 0
        (checkpoint,) = Path("lightning_logs").rglob("*.ckpt")
        shutil.copy(checkpoint, "lightning_logs/last.ckpt")
        shutil.rmtree("out/gradual")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_work(
    page: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "_FOLDER", workplace / "configs")
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    written = [text for where, text in blocks("yaml") if where == page and "pretrained:" in text]
    if written:
        whole = next(text for text in written if "plan:" in text)
        (tmp_path / "my.yaml").write_text(whole.replace("HuggingFaceTB/SmolLM2-135M", "out/smollm2-135m"))
    (tmp_path / "my_module.py").write_text("".join(text for where, text in blocks("python") if where == page))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    for command in commands(page):
        arguments = shlex.split(command, comments=True)[1:]
        output = next((after for option, after in pairwise(arguments) if option == "--output"), None)
        if output and Path(output).is_dir() and arguments.count(output) == 1:
            shutil.rmtree(output)  # made for the commands that read it; this one writes it
        assert main([*arguments, *_smaller(arguments)]) == 0, command
        assert output is None or Path(output).exists()


def _smaller(arguments: list[str]) -> list[str]:
    """Return options that make a command last seconds, and need no network."""
    options = {"prune": [*SMALL, *QUICK], "fit": SMALL, "test": SMALL}.get(arguments[0], [])
    if "--tasks" in arguments or "tasks/zero_shot" in arguments:
        options = [*options, "--tasks", "[sums]", "--harness.include_path", "tasks", "--harness.trust", "true"]
    return options


@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more threads than free cores wait for each other at every operation
    content = nbformat.reads(_SHORT_TRAINING.sub(r"max_steps=\g<1>", notebook.read_text()), as_version=4)
    assert not any(cell.get("outputs") for cell in content.cells)  # they would be out of date one day
    executed = NotebookClient(content, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output["data"] for cell in executed.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("<table" in data.get("text/html", "") for data in shown)  # the report
    assert (tmp_path / "pruned" / "masks.safetensors").is_file()


def test_there_are_commands_and_pages() -> None:
    assert sum(len(commands(page)) for page in WITH_COMMANDS) > 20 and len(PAGES) > 15


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: value[:30] if "/" in value else "")
def test_a_yaml_is_understood(page: str, text: str, tmp_path: Path) -> None:
    run = yaml.safe_load(text)
    run.setdefault("model", {}).setdefault("pretrained", "random")
    run["trainer"] = {"default_root_dir": str(tmp_path), **run.get("trainer", {})}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    build(["--config", str(tmp_path / "run.yaml")], run=False)


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: value[:30] if "/" in value else "")
def test_python_runs(page: str, text: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(text, page, "exec")
    if ".cuda()" in text:
        return  # tests/runtime/test_sparse_layers.py runs it where there is such a device
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    if '"small-model"' in text:
        shutil.copytree(tmp_path / "sparse-model", tmp_path / "small-model")
    if '"smaller"' in text:
        shutil.copytree(tmp_path / "sparse-model", tmp_path / "smaller")
    monkeypatch.chdir(tmp_path)
    if '"packed-model"' in text:
        packed = "export --model.pretrained sparse-model --to packed --bits 8 --output packed-model"
        assert main(packed.split()) == 0
    exec(code, {})
