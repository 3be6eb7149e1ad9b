"""Tasks of lm-evaluation-harness: they run nothing without trust, and their mistakes are one line."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch import OutOfMemoryError, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training.lm_eval import Harness, _unknown

pytest.importorskip("lm_eval")
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
PAYLOADS = {
    "a function": "process_docs: !function evil.run",
    "a class": "class: !function evil.run",
    "a template": "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ran') }}\"",
}
MISTAKES = {
    "a field": ({"doc_to_text": "{{nothing.at.all}}"}, "UndefinedError: 'nothing' is undefined"),
    "a split": ({"test_split": "train"}, "KeyError: 'train'"),
    "a template": ({"doc_to_text": "{{question"}, "TemplateSyntaxError: unexpected end of template"),
    "a key": ({"banana": 3}, "TypeError: .*'banana'"),
    "an output type": ({"output_type": "banana"}, "ValueError: .*'banana'"),
    "choices": ({"doc_to_choice": 3}, "TypeError"),
    "no dataset": ({"dataset_path": None}, "TypeError: .*NoneType"),
    "a group of itself": ({"group": "sums", "task": ["sums"]}, "RecursionError: "),
    "a member": ({"group": "sums", "task": ["nobody"]}, "(TypeError|KeyError): "),  # by version of lm-eval
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
    with suppress(InputError):  # the class is none
        Harness(include_path=str(folder), trust=True, limit=1).evaluate(model, tokenizer, ["sums"])
    assert Path("ran").exists()


def change(folder: Path, changes: dict[str, object]) -> None:
    file = folder / "sums.yaml"
    task = {} if "group" in changes else yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(task | changes))


@pytest.mark.parametrize(("changes", "reason"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_task_file_is_one_line(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, changes: dict[str, object], reason: str
) -> None:
    change(folder, changes)
    (folder / "other.yaml").write_text("task: other\n")
    harness = Harness(include_path=str(folder), trust=True, limit=2)
    with pytest.raises(InputError, match=rf"^tasks are sums: .*\({reason}.*check .* harness\.include_path '{folder}'$"):
        harness.evaluate(model, tokenizer, ["sums"])


def test_a_task_without_a_name_is_one_line(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, few_tasks: None
) -> None:
    change(folder, {"task": 3})
    refused = r"they cannot be run \(TypeError: "  # or passed over, in older versions of lm-eval
    with pytest.raises(
        InputError,
        match=rf"^tasks (are sums: {refused}|name 'sums', which neither a valid file).*harness\.include_path",
    ):
        Harness(include_path=str(folder), trust=True, limit=2).evaluate(model, tokenizer, ["sums"])


def test_a_mistake_in_the_data_is_one_line(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    harness = Harness(include_path=str(folder), trust=True)
    (folder / "sums.jsonl").write_text("{no json\n")
    with pytest.raises(InputError, match=r"tasks are sums: .*\(ArrowInvalid: JSON.*harness\.include_path"):
        harness.evaluate(model, tokenizer, ["sums"])
    (folder / "sums.jsonl").unlink()
    with pytest.raises(InputError, match=r"tasks are sums: their data cannot be loaded.*sums\.jsonl"):
        harness.evaluate(model, tokenizer, ["sums"])


def test_more_examples_than_documents_are_refused(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    with pytest.raises(InputError, match=r"tasks are sums: .*Sample larger.* and harness\.num_fewshot$"):
        Harness(include_path=str(folder), trust=True, num_fewshot=13).evaluate(model, tokenizer, ["sums"])


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "def run(docs):\n    raise SystemExit(0)"])
def test_a_task_cannot_end_the_command(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, code: str
) -> None:
    (folder / "evil.py").write_text(f"{code}\n")
    with (folder / "sums.yaml").open("a") as file:
        file.write("process_docs: !function evil.run\n")
    with pytest.raises(InputError, match=r"tasks are sums: they cannot be run \(SystemExit: 0\)"):
        Harness(include_path=str(folder), trust=True).evaluate(model, tokenizer, ["sums"])


def test_a_pattern_is_not_the_name_of_a_task() -> None:
    assert _unknown(SimpleNamespace(all_tasks=["sums"]), ["sums", "*"]) == ["*"]


def test_only_a_users_mistake_in_the_harness_own_tasks_is_converted() -> None:
    refused = pytest.raises(InputError, match=r"tasks are a, b: .*ValueError: Duplicate task 'a'\); check tasks$")
    with refused, Harness()._mistakes(["a", "b"]):
        raise ValueError("Duplicate task 'a'")
    for error in (RuntimeError("a bug"), KeyboardInterrupt(), SystemExit(0)):
        with pytest.raises(type(error)), Harness()._mistakes(["a"]):
            raise error


def test_running_out_of_memory_is_no_mistake_in_a_task(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError), Harness(include_path=str(folder), trust=True)._mistakes(["sums"]):
        raise OutOfMemoryError


@pytest.mark.parametrize("changes", [{"group": "sums", "task": []}, {"metric_list": []}], ids=["a group", "a task"])
def test_tasks_without_scores_are_refused(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, changes: dict[str, object]
) -> None:
    change(folder, changes)
    refused = r"'sums' has no scores|they cannot be run \(StopIteration\)"  # the second for a group in older versions
    with pytest.raises(InputError, match=f"tasks are sums: ({refused})"):
        Harness(include_path=str(folder), trust=True, limit=2).evaluate(model, tokenizer, ["sums"])


def test_a_group_needs_no_scores_of_its_own(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    (folder / "group.yaml").write_text("{group: all, task: [sums]}")
    scores = Harness(include_path=str(folder), trust=True, limit=2).evaluate(model, tokenizer, ["all"])
    assert "acc" in scores["sums"] and not scores["all"]


class Failing(LlamaForCausalLM):
    """A model whose forward fails, in the middle of the harness's progress bar."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("forward failed")


def test_an_error_ends_the_line_of_the_progress_bar(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ""
    try:
        Harness(include_path=str(folder), trust=True).evaluate(Failing(model.config), tokenizer, ["sums"])
    except InputError:  # pytest.raises would leave the frames, and so close the bar
        shown = capsys.readouterr().err
    assert "Running loglikelihood requests" in shown and shown.endswith("\n")


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
