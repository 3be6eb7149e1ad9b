"""Every YAML in configs/ is instantiated as the command line does it."""

from pathlib import Path

import pytest

from lit_prune.cli import build
from lit_prune.training import LitCausalLM, TextDataModule

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_instantiated(config: Path, tmp_path: Path) -> None:
    cli = build(["--config", str(config), "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert isinstance(cli.model, LitCausalLM)
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.tokenizer == cli.model.pretrained


def test_there_are_configs() -> None:
    assert CONFIGS
