"""Private names of other libraries stand in ``lit_prune.internals`` alone, and are still there."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from transformers import PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

from lit_prune.internals.lightning import OVERRIDDEN
from lit_prune.internals.lm_eval import DESCRIBE, without_description

ROOT = Path(__file__).parents[1]
INTERNALS = ROOT / "lit_prune" / "internals"
FILES = [file for folder in ("lit_prune", "callbacks") for file in (ROOT / folder).rglob("*.py")]
OF_PYTHON_AND_TORCH = {
    "_asdict",  # documented, of NamedTuple
    "_fields",
    "_field_defaults",
    "_actions",  # of argparse, for closest matches
    "_parameters",  # of nn.Module
    "_apply",
    "_StorageInfo",  # what a checkpoint's metadata may hold
}


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for file in FILES:
        yield file, ast.parse(file.read_text())


def defined() -> set[str]:
    """Return the names that the project itself defines."""
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if ast.unparse(node.value) == "self" else "")
    return found


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lit_prune"):
            yield from ((node.lineno, alias.name) for alias in node.names)
            yield from ((node.lineno, part) for part in (node.module or "").split("."))


def test_private_names_of_others_stand_in_one_place() -> None:
    ours = defined() | OF_PYTHON_AND_TORCH
    found = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file, tree in trees()
        if INTERNALS not in file.parents
        for line, name in private_names(tree)
        if name.startswith("_") and not name.startswith("__") and name not in ours
    ]
    assert not found


def test_the_names_of_this_test_are_found() -> None:
    names = {name for file, tree in trees() if INTERNALS in file.parents for _, name in private_names(tree)}
    assert {"_hp_mapping", "_z3_optimizer", "_average_model", "_apply_gate"} <= names


def source_of_deepspeed(module: str) -> str:
    deepspeed = pytest.importorskip(f"deepspeed.{module}")
    return inspect.getsource(deepspeed)


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        *(
            (owner, name, "lightning")
            for owner in (LightningCLI, RichProgressBar)
            for name in OVERRIDDEN[owner.__name__]
        ),
        (LightningCLI, "_parser", "lightning"),
        (LightningCLI, "_get", "lightning"),
        (ModelCheckpoint, "_monitor_candidates", "lightning"),
        (ModelCheckpoint, "_save_topk_checkpoint", "lightning"),
        (WeightAveraging(), "_average_model", "lightning"),
        (ModelParallelStrategy(), "_data_parallel_size", "lightning"),
        (ModelParallelStrategy(), "_tensor_parallel_size", "lightning"),
        (DeepSpeedStrategy, "_init_deepspeed_distributed", "lightning"),
        (modeling_mixtral.MixtralExperts, "_apply_gate", "transformers"),
        (PreTrainedModel, "_keys_to_ignore_on_load_unexpected", "transformers"),
        (PreTrainedModel, "_hf_peft_config_loaded", "transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_private_name_is_still_there(owner: Any, name: str, file: str) -> None:
    assert hasattr(owner, name), f"{file} has taken {name} away: see lit_prune/internals/{file}.py"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("utils.mixed_precision_linkage", "_hp_mapping"),
        ("runtime.zero.stage3", "_z3_optimizer"),
        ("runtime.zero.stage3", "grad_position"),
        ("runtime.zero.stage3", "def get_param_id"),
        ("runtime.zero.stage3", "fp32_partitioned_groups_flat"),
    ],
)
def test_a_private_name_of_deepspeed_is_still_there(module: str, name: str) -> None:
    assert name in source_of_deepspeed(module), f"deepspeed has taken {name} away: see lit_prune/internals/deepspeed.py"


@pytest.mark.parametrize("name", DESCRIBE)
def test_a_function_that_lm_eval_is_kept_from_calling_is_still_called(name: str) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    assert f"{name}(" in inspect.getsource(evaluator.simple_evaluate), "see lit_prune/internals/lm_eval.py"
    original = getattr(evaluator, name)
    with without_description():
        assert getattr(evaluator, name)({}) is None
    assert getattr(evaluator, name) is original


def test_gguf_reads_through_the_method_that_is_bounded() -> None:
    from gguf import GGUFReader

    assert "self._get(" in inspect.getsource(GGUFReader), "GGUFReader reads otherwise: see internals/gguf.py"
