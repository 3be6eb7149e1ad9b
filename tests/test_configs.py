"""Every YAML in configs/ is instantiated as the command line does it."""

from pathlib import Path

import pytest
import yaml

from lit_prune.callbacks.keep_masks import check_strategy
from lit_prune.cli import build, main
from lit_prune.training import LitCausalLM, TextDataModule

FOLDER = Path(__file__).parents[1] / "configs"
STRATEGIES = sorted((FOLDER / "strategies").glob("*.yaml"))
TASKS = sorted((FOLDER / "tasks").glob("*.yaml"))
CONFIGS = [path for path in sorted(FOLDER.rglob("*.yaml")) if path not in STRATEGIES + TASKS]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_instantiated(config: Path, tmp_path: Path) -> None:
    cli = build(["--config", str(config), "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert isinstance(cli.model, LitCausalLM)
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.tokenizer == cli.model.pretrained


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_lies_over_a_run_and_holds_masks(strategy: Path, tmp_path: Path) -> None:
    run = ["--config", str(FOLDER / "gradual.yaml"), "--config", str(strategy), "--trainer.accelerator", "cpu"]
    cli = build([*run, "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert cli.trainer.world_size == 2
    check_strategy(cli.trainer.strategy)


@pytest.mark.parametrize("tasks", TASKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "command", [["evaluate"], ["prune", "--config", str(FOLDER / "demo.yaml")]], ids=lambda c: c[0]
)
def test_tasks_lie_over_an_evaluation_and_a_pruning(
    tasks: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--config", str(tasks), "--model.pretrained", "any", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["tasks"] == yaml.safe_load(tasks.read_text())["tasks"]


def test_there_are_configs() -> None:
    assert CONFIGS
    assert STRATEGIES
    assert TASKS
