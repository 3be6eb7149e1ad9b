"""The YAML of docs/masks.md is what the command line accepts."""

import re
from pathlib import Path

import pytest
import yaml

from lit_prune.callbacks.keep_masks import check_strategy
from lit_prune.cli import build

TEXT = (Path(__file__).parents[2] / "docs" / "masks.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_is_accepted(block: str, tmp_path: Path) -> None:
    content = yaml.safe_load(block)
    content["trainer"] |= {"accelerator": "cpu", "default_root_dir": str(tmp_path)}
    content |= {"model": {"pretrained": "random"}, "data": {"dataset": "embedded"}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    trainer = build(["--config", str(config)], run=False).trainer
    check_strategy(trainer.strategy)
    assert trainer.world_size == content["trainer"].get("devices", 1)
