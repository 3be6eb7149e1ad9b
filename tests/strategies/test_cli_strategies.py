"""The command line in two processes: train, go on from a checkpoint, export one, with the configs of ``configs/``."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.cli import main
from lit_prune.models.experts import take_apart
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from support.cells import LLAMA, count_pruned, difference
from support.processes import Ended, run_ranks
from support.scripts import run_script

MIXTURE = {
    **LLAMA,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 25,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
"""Its routers have biases that are not trained, in buffers."""
BIAS = 0.25
RUN = {
    "data": {"dataset": "embedded", "sequences": 4, "seqlen": 32, "max_windows": 16},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_progress_bar": False,
        "limit_val_batches": 1,
        "callbacks": [
            {
                "class_path": "Prune",
                "init_args": {
                    "plan": {
                        "pattern": {"class_path": "Unstructured", "init_args": {"sparsity": 0.5}},
                        "scorer": {"class_path": "Wanda"},
                    },
                    "schedule": {"class_path": "Step", "init_args": {"every": 3, "times": 2}},
                },
            },
            {"class_path": "KeepMasks"},
            {"class_path": "Export", "init_args": {"output": "trained"}},
            {
                "class_path": "ModelCheckpoint",
                "init_args": {
                    "dirpath": "checkpoints",
                    "filename": "{step}",
                    "every_n_train_steps": 2,
                    "save_top_k": -1,
                },
            },
        ],
    },
}


@pytest.mark.timeout(900)  # two processes, and for DeepSpeed a compiler, on a machine that may be busy
@pytest.mark.parametrize(("strategy", "config"), [("fsdp2", MIXTURE), ("zero3", MIXTURE)])
def test_fit_resume_and_export_of_a_sharded_checkpoint_agree(
    strategy: str, config: dict[str, object], tmp_path: Path
) -> None:
    dense = load_model("random", config=config)
    for name, buffer in dense.named_buffers():
        if name.endswith("correction_bias"):
            buffer.fill_(BIAS)
    save_pruned(tmp_path / "dense", dense, load_tokenizer("random"), {}, {})
    run = {**RUN, "model": {"pretrained": "dense"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    configs = ["-c", "run.yaml", "-c", f"strategies/{strategy}"]

    def lit_prune(processes: int, command: str, *arguments: str) -> None:
        ended = run_ranks(tmp_path / "log", partial(main, [command, *configs, *arguments]), processes, folder=tmp_path)
        assert not any(process.code for process in ended), ended

    lit_prune(2, "fit")
    halfway, last = (tmp_path / "checkpoints" / f"step={step}.ckpt" for step in (2, 4))
    assert halfway.is_dir() and last.is_dir()
    lit_prune(1, "export", "--checkpoint", str(last), "--output", "exported")
    (tmp_path / "trained").rename(tmp_path / "straight")
    lit_prune(2, "fit", "--ckpt_path", str(halfway))  # between the prunings after steps 0 and 3

    for other in ("exported", "trained"):
        assert difference(tmp_path / other, tmp_path / "straight") < 1e-6
        model, masks = load_model(str(tmp_path / other)), load_masks(tmp_path / other)
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        assert all((bias == BIAS).all() for bias in biases) and len(biases) == (2 if config is MIXTURE else 0)
        take_apart(model)
        weights = model.state_dict()
        revived, pruned = count_pruned(iter(weights.items()), masks)
        assert revived == 0
        assert pruned > 0.49 * sum(weights[name].numel() for name in masks)  # 24 of 49 inputs


@pytest.mark.timeout(600)
def test_one_shot_pruning_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64, so that no weight is chosen otherwise because two processes add up in another order.
    dense = load_model("random", torch.float64, LLAMA)
    save_pruned(tmp_path / "dense", dense, load_tokenizer("random"), {}, {})
    run = {"data": {**RUN["data"], "sequences": 32}, "model": {"pretrained": "dense"}}
    plan = {
        "pattern": {"class_path": "Unstructured", "init_args": {"sparsity": 0.5}},
        "solver": {"class_path": "SparseGPT"},
    }
    prunes = [{"class_path": "Prune", "init_args": {"plan": plan}}]
    run["trainer"] = {"accelerator": "cpu", "logger": False, "callbacks": prunes}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    def prune(output: str, *arguments: str, processes: int = 1) -> Ended:
        command = ["prune", "-c", "run.yaml", "--output", output, *arguments]
        return run_ranks(tmp_path / "log", partial(main, command), processes, folder=tmp_path)[0]

    ddp = ["-c", "strategies/ddp"]
    assert "pruning takes about" in prune("one").said
    program = Path(sys.executable).parent / "lit-prune"
    monkeypatch.chdir(tmp_path)
    ended = run_script(tmp_path / "log", program, "prune", "-c", "run.yaml", "--output", "two", *ddp)
    assert ended.code == 0 and "MEMBER: 2/2" in ended.said, ended.said  # it starts the other process itself
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-9  # 1,000 sums, conditions below 1,000
    report = json.loads((tmp_path / "two" / "pruning.json").read_text())
    assert report["evaluation"]["perplexity_after"] > 0 and len(report["samples"]) == 2
    assert prune("lazy", "--model.lazy", "blocks", *ddp, processes=2).code == 0
    expected = load_model(str(tmp_path / "two")).state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in load_model(str(tmp_path / "lazy")).state_dict().items())
    assert not (tmp_path / "blocks").exists() and not list(tmp_path.glob(".*"))
    refused = prune("three", "-c", "strategies/fsdp2")
    assert refused.code == 2 and "trainer.strategy is FSDP2: to prune once, use ddp" in refused.said


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_units_are_removed_and_kept_removed_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    plan = {
        "pattern": {"class_path": "Structured", "init_args": {"sparsity": 0.5, "units": ["channels", "heads"]}},
        "solver": {"class_path": "SparseGPT"},
        "correction": 0.3,
    }
    pruning = {"class_path": "Prune", "init_args": {"plan": plan}}
    export = {"class_path": "Export", "init_args": {"output": strategy}}
    trainer = {**RUN["trainer"], "max_steps": 2, "callbacks": [pruning, {"class_path": "KeepMasks"}, export]}
    model = {"pretrained": "random", "config": {**LLAMA, "intermediate_size": 48}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "model": model, "trainer": trainer}))
    command = ["fit", "-c", "run.yaml", "-c", f"strategies/{strategy}"]
    ended = run_ranks(tmp_path / "log", partial(main, command), 2, folder=tmp_path)
    assert not any(process.code for process in ended), ended
    small = load_model(str(tmp_path / strategy))
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (24, 1)  # type: ignore[union-attr]
