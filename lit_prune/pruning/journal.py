"""Finished blocks on disk, so that a run that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.access import read_weight, write_weight
from lit_prune.models.calibrate import Batch
from lit_prune.models.io import data_fingerprint, load_tensors, model_fingerprint, read_json, save_tensors, write_json
from lit_prune.models.targets import Target
from lit_prune.ops import PackedMask
from lit_prune.pruning.report import LayerReport


class Journal:
    """One folder: ``run.json`` says what is being pruned, with what and how; two files hold each finished block."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
        """Open or start a journal.

        Args:
            folder: where it lies.
            identity: plan, model and data of this run.
            resume: go on from what is there; else it is dropped.

        Raises:
            InputError: where the journal belongs to another plan, model or data; it names what differs.
        """
        self._folder = folder
        run = folder / "run.json"
        if resume and run.is_file():
            differences = list(_differences(read_json(run), dict(identity)))
            if differences:
                raise InputError(
                    f"cannot resume from {str(folder)!r}: {'; '.join(differences[:3])}; "
                    "resume with what the run was started with, or start again without --resume"
                )
        else:
            self.remove(folder)
            write_json(run, dict(identity))

    def finished(self, block: int) -> bool:
        """Tell whether a block is complete on disk."""
        return self._layers(block).is_file()

    def save(self, block: int, targets: Sequence[Target], layers: Sequence[LayerReport]) -> None:
        """Write a finished block: its weights and masks first, then the file that says they are complete."""
        tensors = {f"weight {t.name}": read_weight(t.module).cpu() for t in targets}
        tensors |= {f"mask {layer.name}": layer.mask.bits.cpu() for layer in layers}
        save_tensors(self._tensors(block), tensors)
        write_json(self._layers(block), [layer.as_dict() for layer in layers])

    def restore(self, block: int, targets: Sequence[Target]) -> list[LayerReport]:
        """Write a finished block's weights into the model and return what was reported of them."""
        tensors = load_tensors(self._tensors(block))
        records = {record["name"]: record for record in read_json(self._layers(block))}
        layers = []
        for target in targets:
            write_weight(target.module, tensors[f"weight {target.name}"])
            mask = PackedMask(tensors[f"mask {target.name}"], tuple(target.module.get_parameter("weight").shape))
            layers.append(LayerReport.from_dict(records[target.name], mask))
        return layers

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete a journal's own files, and the folder if nothing else is in it."""
        for file in [*folder.glob("block_*"), *folder.glob(".block_*"), folder / "run.json"]:
            file.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _tensors(self, block: int) -> Path:
        return self._folder / f"block_{block:04d}.safetensors"

    def _layers(self, block: int) -> Path:
        return self._folder / f"block_{block:04d}.json"


def identity_of(plan: Mapping[str, Any], model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return what makes a run the same run: the plan and the digests of model and data."""
    return {"plan": dict(plan), "model": model_fingerprint(model), "data": data_fingerprint(batches)}


def _differences(before: Any, now: Any, path: str = "") -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {before!r} and is now {now!r}"
