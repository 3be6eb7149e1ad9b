"""Recovery with distillation in two processes, as the command line runs it: ZeRO-3 and FSDP2 on CPUs."""

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.cli import main
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from support.processes import Ended, run_ranks

ROOT = Path(__file__).parents[2]
WATCH = """
import pathlib
from lightning.pytorch import Callback

class TeacherSize(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        parameters = list(module.loss.teacher.model.parameters())
        if hasattr(parameters[0], "ds_numel"):
            held = sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in parameters)
            whole = sum(parameter.ds_numel for parameter in parameters)
        else:
            held = sum(parameter.to_local().numel() for parameter in parameters)
            whole = sum(parameter.numel() for parameter in parameters)
        pathlib.Path(f"held-{trainer.global_rank}").write_text(f"{held / whole}")
"""


AT_ONCE = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
ZERO = {"stage": 3, **{f"stage3_{name}": 0 for name in AT_ONCE}}  # whole weights are let go as soon as possible
STRATEGIES = {
    "DeepSpeed": {"config": {"zero_optimization": ZERO, "zero_allow_untested_optimizer": True}},
    "FSDP2": {},
}


def saved_parameters(checkpoint: Path) -> set[str]:
    """Return the names of all parameters in a checkpoint, whatever they belong to."""
    for states in checkpoint.rglob("zero_pp_rank_0_mp_rank_00_model_states.pt"):
        (shapes,) = torch.load(states, weights_only=False)["param_shapes"]
        return set(shapes)
    prefix = "state_dict."
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}


@pytest.mark.timeout(600)  # DeepSpeed may have to build its shared-memory communication first
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sharded_model_is_distilled_and_its_best_exported(
    strategy: str, tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    if strategy == "DeepSpeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    save_pruned(tmp_path / "dense", tiny_model("llama"), load_tokenizer("random"), {}, {})
    config = yaml.safe_load((ROOT / "configs" / "recipes" / "recover.yaml").read_text())
    config["model"]["pretrained"] = config["model"]["loss"]["init_args"]["teacher"] = str(tmp_path / "dense")
    config["data"] |= {"dataset": "embedded", "seqlen": 16, "sequences": 4, "max_windows": 40, "batch_size": 1}
    config["plan"]["solver"]["init_args"]["iterations"] = 4
    config["plan"]["reconstruction"]["init_args"] = {"steps": 4}
    config["trainer"] |= {"accelerator": "cpu", "devices": 2}
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 4, "limit_val_batches": 2}
    config["trainer"] |= {"logger": False, "default_root_dir": str(tmp_path)}
    config["trainer"]["callbacks"][-1]["init_args"]["output"] = str(tmp_path / "out")
    config["trainer"]["strategy"] = {
        "class_path": f"lit_prune.training.strategies.{strategy}",
        "init_args": STRATEGIES[strategy],
    }
    (tmp_path / "watch.py").write_text(WATCH)
    config["trainer"]["callbacks"].append({"class_path": "watch.TeacherSize"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def fit(*arguments: str) -> Ended:
        command = ["fit", "--config", "config.yaml", *arguments]
        return run_ranks(tmp_path / "log", partial(main, command), 2, folder=tmp_path)[0]

    result = fit()
    assert result.code == 0, result.said[-3000:]
    for rank in (0, 1):  # each process holds half of the teacher, too
        assert float((tmp_path / f"held-{rank}").read_text()) == pytest.approx(0.5, abs=0.1)
    masks = load_masks(tmp_path / "out")
    check_masks_hold(load_model(str(tmp_path / "out")), masks)
    kept = sum(int(mask.unpack().sum()) for mask in masks.values())
    assert kept == pytest.approx(0.3 * sum(mask.unpack().numel() for mask in masks.values()), rel=1e-2)
    course = json.loads((tmp_path / "out" / "pruning.json").read_text())["validation"]
    assert [[step for step, _ in points] for points in course.values()] == [[0, 4, 8]] * 2
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    names = {name for name, _ in tiny_model("llama").named_parameters()}
    assert saved_parameters(checkpoint) == {f"model.{name}" for name in names}  # and no teacher

    keep = {"class_path": "KeepMasks", "init_args": {"masks": str(tmp_path / "out")}}
    config["trainer"]["callbacks"] = [keep, {"class_path": "Export", "init_args": {"output": str(tmp_path / "more")}}]
    del config["plan"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    refused = fit()  # the dense model, which the masks were made for but whose weights are not zero
    assert refused.code == 2 and "masks of another model" in refused.said
    result = fit("--model.pretrained", str(tmp_path / "out"))
    assert result.code == 0, result.said[-3000:]
    check_masks_hold(load_model(str(tmp_path / "more")), masks)
