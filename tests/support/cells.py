"""Cells of the table of docs/masks.md: a tiny Llama trained and pruned under a strategy, precision and optimizer."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed
from torch.optim import Optimizer

from lit_prune.callbacks import Export, KeepMasks, Prune
from lit_prune.callbacks.keep_masks import find_keep_masks
from lit_prune.checkpoint.files import load_tensors
from lit_prune.checkpoint.masks import load_masks
from lit_prune.ops import PackedMask, Unstructured
from lit_prune.pruning import PruningPlan, Step
from lit_prune.scorers import Wanda
from lit_prune.sharding.parameters import shards
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.strategies import FSDP2, DeepSpeed
from support import training
from support.processes import run_ranks

STRATEGIES: dict[str, Callable[[], Any]] = {
    "single": lambda: "auto",
    "DDP": lambda: "ddp",
    "FSDP2": FSDP2,
    "ZeRO-1": lambda: DeepSpeed(1),
    "ZeRO-2": lambda: DeepSpeed(2),
    "ZeRO-3": lambda: DeepSpeed(3),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, weight_decay=0.1),
}
STEPS = 20
HELD = ("live", "masters", "moments")
PLACES = (*HELD, "checkpoint", "export")
LLAMA = {**training.LLAMA, "intermediate_size": 49}  # shards of unequal size
_COLUMN = {"weight": "live", "gathered weight": "live", "master": "masters"}


class Count(Callback):
    """Counts, after every batch, the pruned weights that are not zero, wherever this process holds them."""

    def __init__(self, result: Path) -> None:
        """Keep the file to write to."""
        self.result = result
        self.revived = dict.fromkeys(HELD, 0)
        self.looked_at = dict.fromkeys(HELD, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add what is not zero; remember how many values were looked at."""
        keeper = find_keep_masks(trainer)
        assert keeper is not None and keeper.masks
        self.looked_at = dict.fromkeys(HELD, 0)
        for name, mask in keeper.masks.items():
            for share in shards(pl_module.get_submodule("model").get_parameter(name), trainer.optimizers[0]):
                pruned = share.read()[~share.cut(mask.unpack())]
                column = _COLUMN.get(share.place, "moments")
                self.revived[column] += int(pruned.count_nonzero())
                self.looked_at[column] += pruned.numel()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the processes up and write the sums."""
        mine = [[self.revived[column], self.looked_at[column]] for column in HELD]
        everybody: list[Any] = [mine]
        if distributed.is_initialized():
            everybody = [None] * distributed.get_world_size()
            distributed.all_gather_object(everybody, mine)
        if trainer.is_global_zero:
            sums = torch.tensor(everybody).sum(0).tolist()
            self.result.write_text(json.dumps(dict(zip(HELD, sums, strict=True))))


def ranks(cell: str) -> int:
    """Return the number of processes that train a cell together."""
    return 1 if cell.startswith("single ") else 2


def train(cell: str, folder: Path, callbacks: Sequence[Callback] = (), resume: Path | None = None) -> None:
    """Train and prune one cell's model, in each of its processes, and leave all results in a folder.

    Args:
        cell: strategy, precision and optimizer, such as ``ZeRO-2 bf16-mixed AdamW``.
        folder: for ``held.json``, ``export`` and the checkpoints ``step=5``, ``step=10``, ...
        callbacks: more of them.
        resume: checkpoint to go on from.
    """
    torch.set_num_threads(1)
    strategy, precision, optimizer = cell.split()
    processes = ranks(cell)
    seed_everything(0, verbose=False)
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if precision == "bf16-true" else "float32"
    module = LitCausalLM("random", dtype, config=LLAMA, optimizer=OPTIMIZERS[optimizer])
    data = TextDataModule(
        "random", dataset="embedded", seqlen=16, sequences=4, max_windows=64, batch_size=2 // processes
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=STRATEGIES[strategy](),
        precision=precision,  # type: ignore[arg-type]
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.5,  # some steps are clipped and others are not, so a wrong scale would show
        limit_val_batches=2,
        val_check_interval=16,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Prune(PruningPlan(Unstructured(0.5), Wanda()), Step(every=10, times=2)),
            KeepMasks(),
            Count(folder / "held.json"),
            Export(str(folder / "export"), overwrite=True),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1),
            *callbacks,
        ],
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)


def checkpoint_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield parameter names and tensors of a checkpoint: weights or masters, and moments that it keeps by parameter."""
    if (path / "latest").is_file():  # DeepSpeed
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        yield from get_fp32_state_dict_from_zero_checkpoint(str(path)).items()  # the masters
        live = path / "checkpoint" / "mp_rank_00_model_states.pt"
        if live.is_file():  # stages 1 and 2
            yield from torch.load(live, weights_only=False)["module"].items()
        return
    content = _load_sharded(path) if path.is_dir() else torch.load(path, weights_only=False)
    yield from content["state_dict"].items()
    names = list(content["state_dict"])
    state = content["optimizer_0" if path.is_dir() else "optimizer_states"]
    for name, moments in (state if path.is_dir() else state[0])["state"].items():
        for value in moments.values():
            yield name if isinstance(name, str) else names[name], value


def _load_sharded(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, file)
        return torch.load(file, weights_only=False)


def count_pruned(tensors: Iterator[tuple[str, Tensor]], masks: Mapping[str, PackedMask]) -> tuple[int, int]:
    """Return how many pruned values are not exactly zero, and how many were looked at."""
    revived, looked_at = 0, 0
    for name, value in tensors:
        mask = masks.get(name.removeprefix("model."), masks.get(name))
        if mask is not None and tuple(value.shape) == mask.shape:
            pruned = value[~mask.unpack()]
            revived += int(pruned.count_nonzero())
            looked_at += pruned.numel()
    return revived, looked_at


def difference(folder: Path, reference: Path) -> float:
    """Return the largest relative difference (of norms, by parameter) between two exports with the same masks."""
    masks, others = load_masks(folder), load_masks(reference)
    if any(not torch.equal(masks[name].bits, others[name].bits) for name in others):
        return float("inf")
    weights, expected = (load_tensors(path / "model.safetensors") for path in (folder, reference))
    return max(float((weights[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def last_checkpoint(folder: Path) -> Path:
    """Return the newest of a cell's checkpoints."""
    return max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


def measure(cell: str, folder: Path) -> dict[str, Any]:
    """Return the figures of a cell that has been trained, all but its difference to the single device."""
    masks = load_masks(folder / "export")
    held: dict[str, Any] = json.loads((folder / "held.json").read_text())
    return {
        "cell": cell,
        **held,
        "checkpoint": count_pruned(checkpoint_tensors(last_checkpoint(folder)), masks),
        "export": count_pruned(iter(load_tensors(folder / "export" / "model.safetensors").items()), masks),
    }


def start(cell: str, folder: Path, training: Callable[..., None] = train) -> str | None:
    """Train a cell in fresh processes; return the message of the error that stopped it, if one did.

    Args:
        cell: as in ``train``.
        folder: for the results and for what each process printed.
        training: ``train``, or a ``functools.partial`` of what calls it.
    """
    ended = run_ranks(folder / "log", partial(training, cell, folder), ranks(cell))
    if all(process.code == 0 for process in ended):
        return None
    said = "\n".join(process.said for process in ended)
    errors = re.findall(r"^(?:\[rank\d\]: )?([\w.]*(?:Error|Exception): .*)", said, re.MULTILINE)
    return errors[0] if errors else f"exit status {[process.code for process in ended]}, see {folder}"


def run(cell: str, out: Path) -> dict[str, Any]:
    """Run one cell and return its figures, or the error that stopped it."""
    folder = cell_folder(out, cell)
    error = start(cell, folder)
    if error is not None:
        return {"cell": cell, "error": error}
    record = measure(cell, folder)
    strategy, precision, optimizer = cell.split()
    reference = cell_folder(out, f"single {precision} {optimizer}") / "export"
    if strategy != "single" and precision == "32-true" and reference.is_dir():
        record["difference"] = difference(folder / "export", reference)
    return record


def cell_folder(out: Path, cell: str) -> Path:
    """Return the folder of a cell's results."""
    return out / cell.replace(" ", "_")
