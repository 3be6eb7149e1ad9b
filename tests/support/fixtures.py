"""Small models and golden numbers that many tests share."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, distributed, nn

import support.docstrings
import support.figures
import support.samples
import support.tokens  # noqa: F401
from lit_prune.models.load import load_model
from lit_prune.ops import LayerStats
from support.shared import Shared

DATA = Path(__file__).parents[1] / "data"

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 384}
_GROUPED = {**_WIDTHS, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "opt": {**_WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 384, "n_positions": 64, "n_inner": 48},
    "gpt_neox": {**_WIDTHS, "intermediate_size": 48, "max_position_embeddings": 64},
}
"""Tiny models of six architectures, one with Conv1D, two with tied embeddings, one with two kinds of attention."""


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Results that several tests ask for, worked out once."""
    return Shared(tmp_path_factory)


@pytest.fixture(autouse=True)
def _environment_kept() -> Iterator[None]:
    """Undo what a test leaves in the environment: Lightning leaves its port and rank, which a child would take up."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from one seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """Build a tiny random model: ``tiny_model("llama")``."""

    def build(model_type: str = "llama", seed: int = 0, **config: object) -> nn.Module:
        torch.manual_seed(seed)
        return load_model("random", config={"model_type": model_type, **CONFIGS[model_type], **config})

    return build


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def tokens() -> list[Tensor]:
    """Two calibration batches of three sequences of sixteen tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, 16), generator=generator) for _ in range(2)]


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """The reference implementations' numbers for one layer, which they worked out in float32.

    In float64, so that our own rounding, which differs from processor to processor, is far below theirs.
    """
    with np.load(DATA / "layer.npz") as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


@pytest.fixture(scope="session")
def golden_stats(golden: dict[str, Tensor]) -> LayerStats:
    """The statistics of the golden layer's inputs."""
    return LayerStats.from_inputs(golden["inputs"])


@pytest.fixture(scope="session")
def golden_errors() -> dict[str, float]:
    """The reference implementations' relative output errors on the golden layer."""
    return json.loads((DATA / "summary.json").read_text())["relative_output_error"]


@pytest.fixture(scope="session")
def write_task() -> Callable[[Path], Path]:
    """Make a folder with a task ``sums`` for lm-evaluation-harness: twelve questions with two answers each."""

    def write(folder: Path) -> Path:
        folder.mkdir()
        questions = [
            {"question": f"{k} and {k} make", "answers": [str(2 * k), "some"], "right": k % 2} for k in range(12)
        ]
        (folder / "sums.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
        task = {
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "answers",
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / "sums.yaml").write_text(yaml.safe_dump(task))
        return folder

    return write


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-evaluation-harness define ARC's tasks alone: it would read 13,000 files."""
    folder = Path(pytest.importorskip("lm_eval.tasks").__file__).parent
    home = sys.modules[import_module("lm_eval.tasks").TaskManager.__module__]
    monkeypatch.setattr(home, "__file__", str(folder / "arc" / "tasks.py"))
