"""Speed of whole models, and from a smaller folder to a page that compares it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch import nn

from lit_prune.checkpoint.save import save_pruned
from lit_prune.cli import main
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.runtime import model_speed
from lit_prune.runtime.model_speed import compare_speed, weight_bytes
from support.training import LLAMA


def test_a_model_of_a_tenth_of_the_work_is_faster(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_speed, "PROMPT", 128)
    small = tiny_model(num_hidden_layers=1)
    dense = tiny_model(num_hidden_layers=12, intermediate_size=512)
    found = compare_speed(small.eval(), dense.eval(), rounds=3)
    assert [figure.task for figure in found][:2] == ["generation, 1 sequence", "generation, 8 sequences"]
    assert all(figure.ratio > 1 and figure.model > figure.dense > 0 for figure in found)
    assert weight_bytes(dense) == 4 * sum(parameter.numel() for parameter in dense.parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_families_are_timed(
    model_type: str, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_speed, "PROMPT", 32)
    model = tiny_model(model_type).eval()
    assert len(compare_speed(model, model, rounds=1)) == 3


def test_a_smaller_model_is_pruned_timed_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_speed, "PROMPT", 32)
    monkeypatch.chdir(tmp_path)
    save_pruned("dense", load_model("random", config=LLAMA), load_tokenizer("random"), {}, {})
    run = {
        "model": {"pretrained": "dense", "dtype": "float32"},
        "data": {"dataset": "embedded", "sequences": 4, "seqlen": 32, "max_windows": 4},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    prune = ["prune", "-c", "run.yaml", "--plan", "structured", "--sparsity", "0.5"]
    assert main([*prune, "--output", "even"]) == 0
    assert main([*prune, "--plan.allocator", "AlphaPruning", "--output", "uneven"]) == 0
    assert "import lit_prune" in Path("uneven/README.md").read_text()
    assert "an ordinary one of its family" in Path("even/README.md").read_text()
    assert json.loads(Path("even/config.json").read_text())["intermediate_size"] == 24
    for folder in ("even", "uneven"):
        assert main(["test", "-c", "run.yaml", "--model.pretrained", folder]) == 0
        speed = ["speed", "-c", "run.yaml", "--model.pretrained", folder]
        assert main([*speed, "--against", "dense", "--output", f"{folder}.json"]) == 0
        assert main([*speed]) == 2  # without masks, there are no sparse layers to time
        assert "masks" in capsys.readouterr().err
    assert main(["compare", "even", "uneven", "--speeds", "even.json", "uneven.json"]) == 0
    page = Path("compare.html").read_text()
    assert "Perplexity against speed: generation, 1 sequence" in page and page.count("<svg") == 6
    again = ["prune", "-c", "run.yaml", "--model.pretrained", "even", "--plan", "sparsegpt", "--output", "sparse"]
    assert main(again) == 0 and Path("sparse/masks.safetensors").is_file()
    assert main([*prune, "--output", "even", "--overwrite"]) == 0


@pytest.mark.parametrize("content", ["[1]", "{}", "[{}]", "no json", '[{"task": "a", "dense": 1, "model": 1}]'])
def test_files_that_hold_no_speeds(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "speed.json").write_text(content)
    folder = str(save_pruned(tmp_path / "out", load_model("random", config=LLAMA), None, {}, {}))
    files = [str(tmp_path / "speed.json"), str(tmp_path / "gone.json")]
    report = tmp_path / "out" / "pruning.json"
    report.write_text("{}")
    for speeds in ([files[0]], [files[1]], files):
        assert main(["compare", folder, "--speeds", *speeds, "--output", str(tmp_path / "all.html")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
