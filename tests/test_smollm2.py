"""The real model of the demo: fetched, pruned and explained by the commands that the README names."""

import json
from pathlib import Path

import pytest

from lit_prune.cli import main
from support.scripts import run_script

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_the_demo_prunes_a_real_model(tmp_path: Path) -> None:
    model = ROOT / "out" / "smollm2-135m"
    fetched = run_script(tmp_path / "log", ROOT / "scripts" / "fetch_smollm2.py", str(model))
    assert fetched.code == 0, fetched.said
    small = ["--data.sequences", "4", "--data.seqlen", "256", "--data.max_windows", "2", "--prompts", "[]"]
    small += ["--plan.include", "*.layers.[0-3].*"]  # the first four of thirty blocks
    paths = ["--model.pretrained", str(model), "--output", str(tmp_path / "out")]
    logs = ["--trainer.default_root_dir", str(tmp_path)]
    assert main(["prune", "--config", "recipes/demo", *paths, *small, *logs]) == 0
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert len(report["layers"]) == 28
    evaluation = report["evaluation"]
    assert 5 < evaluation["perplexity_before"] < 40
    assert 1 < evaluation["perplexity_after"] / evaluation["perplexity_before"] < 2
