"""The documentation site builds, and what it tells people to type is understood."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_prune.cli import build, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, text) of every code block in a language."""
    return [
        (str(page.relative_to(ROOT)), match[2])
        for page in PAGES
        for match in _BLOCK.finditer(page.read_text())
        if match[1] == language
    ]


COMMANDS = sorted(
    {
        line
        for _, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("lit-prune ") and "--help" not in line
    }
)


@pytest.mark.timeout(300)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "methods" / "wanda" / "index.html").read_text()
    assert "class_path" in page and ".. code-block" not in page
    for file in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)"', file.read_text()), file


def test_there_are_commands_and_pages() -> None:
    assert len(COMMANDS) > 10 and len(PAGES) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0][1])
    arguments = shlex.split(command.replace("my.yaml", str(tmp_path / "my.yaml")), comments=True)[1:]
    if arguments[0] == "compare":
        assert main(arguments) == 2  # there are no such runs here, and that is all that is wrong
        assert "holds no pruning.json" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: value[:30] if "/" in value else "")
def test_a_yaml_is_understood(page: str, text: str, tmp_path: Path) -> None:
    run = yaml.safe_load(text)
    if "plan" in run:
        run = {"trainer": {"callbacks": [{"class_path": "Prune", "init_args": run}]}}
    run.setdefault("model", {}).setdefault("pretrained", "random")
    run["trainer"] = {"default_root_dir": str(tmp_path), **run.get("trainer", {})}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    build(["--config", str(tmp_path / "run.yaml")], run=False)


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: value[:30] if "/" in value else "")
def test_python_on_bare_tensors_runs(page: str, text: str) -> None:
    if "from_pretrained" in text or "load_model" in text:
        compile(text, page, "exec")  # needs a model; tests/test_cli.py does as much
    else:
        exec(compile(text, page, "exec"), {})
