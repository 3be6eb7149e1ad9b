"""Every YAML in configs/ is found by its name and instantiated as the command line does it."""

from pathlib import Path

import pytest
import yaml

from lit_prune.callbacks import Prune
from lit_prune.callbacks.keep_masks import check_strategy
from lit_prune.cli import PruningCLI, build, main
from lit_prune.recipes import shipped
from lit_prune.training import LitCausalLM, TextDataModule

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = [item.name for item in shipped()]


def names(folder: str) -> list[str]:
    return [name for name in NAMES if name.startswith(f"{folder}/")]


def built(folder: Path, *arguments: str) -> PruningCLI:
    return build([*arguments, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)], run=False)


@pytest.mark.parametrize("recipe", names("recipes"))
def test_a_recipe_is_instantiated(recipe: str, tmp_path: Path) -> None:
    cli = built(tmp_path, "--config", recipe)
    assert isinstance(cli.model, LitCausalLM)
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.tokenizer == cli.model.pretrained
    assert isinstance(cli.trainer.callbacks[0], Prune)  # type: ignore[attr-defined]


@pytest.mark.parametrize("plan", names("plans"))
def test_a_plan_is_complete(plan: str, tmp_path: Path) -> None:
    """It says all that makes a method, so that nothing of a plan that it is laid over stays."""
    assert set(yaml.safe_load((FOLDER / f"{plan}.yaml").read_text())) == {
        *("pattern", "scorer", "allocator", "solver"),
        *("correction", "residual_correction", "reconstruction", "quantize"),
    }
    cli = built(tmp_path, "--config", "models/smollm2", "--plan", plan)
    assert isinstance(cli.trainer.callbacks[0], Prune)  # type: ignore[attr-defined]


@pytest.mark.parametrize("data", names("data"))
def test_a_model_and_a_text_make_a_run(data: str, tmp_path: Path) -> None:
    cli = built(tmp_path, "-c", "models/smollm2", "-c", data, "--plan=wanda")
    assert cli.model.pretrained == "out/smollm2-135m" and cli.datamodule.sequences >= 32


@pytest.mark.parametrize("strategy", names("strategies"))
def test_a_strategy_lies_over_a_run_and_holds_masks(strategy: str, tmp_path: Path) -> None:
    cli = built(tmp_path, "--config", "recipes/gradual", "--config", strategy)
    assert cli.trainer.world_size == 2
    check_strategy(cli.trainer.strategy)


@pytest.mark.parametrize("tasks", names("tasks"))
@pytest.mark.parametrize("command", [["evaluate"], ["prune", "--config", "recipes/demo"]], ids=lambda c: c[0])
def test_tasks_lie_over_an_evaluation_and_a_pruning(
    tasks: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--config", tasks, "--model.pretrained", "any", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["tasks"] == yaml.safe_load((FOLDER / f"{tasks}.yaml").read_text())["tasks"]


def test_every_file_is_of_a_kind_and_has_a_summary() -> None:
    assert len(NAMES) == len(list(FOLDER.rglob("*.yaml"))) > 20
    kinds = ("models", "data", "plans", "strategies", "tasks", "recipes")
    assert set(NAMES) == {name for kind in kinds for name in names(kind)}
    for item in shipped():
        assert item.path.read_text().startswith("# ") and 20 < len(item.summary) < 120, item.name
