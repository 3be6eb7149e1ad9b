"""Tasks of lm-evaluation-harness: they run nothing without trust, and their mistakes are one line."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training.lm_eval import Harness

pytest.importorskip("lm_eval")
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
PAYLOADS = {
    "a function": "process_docs: !function evil.run",
    "a class": "class: !function evil.run",
    "a template": "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ran') }}\"",
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model("random", config={**LLAMA, "num_key_value_heads": 2, "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("random")


@pytest.fixture
def folder(tmp_path: Path, write_task: Callable[[Path], Path]) -> Path:
    return write_task(tmp_path / "tasks")


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_task_file_runs_code_only_if_it_is_trusted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    payload: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "evil.py").write_text("open('ran', 'w')\n\ndef run(docs=None, **_):\n    return docs\n")
    with (folder / "sums.yaml").open("a") as file:
        file.write(f"{payload}\n")
    with pytest.raises(InputError, match=r"task files may run code.*--harness\.trust true"):
        Harness(include_path=str(folder)).evaluate(model, tokenizer, ["sums"])
    assert not Path("ran").exists()
    with suppress(Exception):  # the class is none
        Harness(include_path=str(folder), trust=True, limit=1).evaluate(model, tokenizer, ["sums"])
    assert Path("ran").exists()


def test_no_program_of_the_working_directory_is_run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "pip.py").write_text("open('pip-ran', 'w')\n")
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(f"#!/bin/sh\ntouch {tmp_path}/git-ran\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Harness(include_path=str(folder), trust=True, limit=1).evaluate(model, tokenizer, ["sums"])
    assert not list(tmp_path.glob("*-ran"))
