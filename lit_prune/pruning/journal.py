"""Finished blocks on disk, so that a run that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.calibrate import Batch
from lit_prune.models.io import data_fingerprint, load_tensors, model_fingerprint, read_json, save_tensors, write_json
from lit_prune.ops import PackedMask
from lit_prune.pruning.report import LayerReport, ReconstructionReport


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
        return self._reports(block).is_file()

    def save(
        self,
        block: int,
        model: nn.Module,
        layers: Sequence[LayerReport],
        reconstructions: Sequence[ReconstructionReport],
    ) -> None:
        """Write a finished block: its parameters and masks first, then the file that says they are complete."""
        names = [layer.parameter for layer in layers] + [name for done in reconstructions for name in done.vectors]
        tensors = {f"parameter {name}": model.get_parameter(name).detach().cpu() for name in names}
        tensors |= {f"mask {layer.name}": layer.mask.bits.cpu() for layer in layers}
        save_tensors(self._tensors(block), tensors)
        records = {
            "layers": [layer.as_dict() for layer in layers],
            "reconstructions": [asdict(done) for done in reconstructions],
        }
        write_json(self._reports(block), records)

    @torch.no_grad()
    def restore(self, block: int, model: nn.Module) -> tuple[list[LayerReport], list[ReconstructionReport]]:
        """Write a finished block's parameters into the model and return what was reported of it."""
        tensors = load_tensors(self._tensors(block))
        records = read_json(self._reports(block))
        layers = []
        for record in records["layers"]:
            shape = tuple(model.get_parameter(f"{record['name']}.weight").shape)
            layers.append(LayerReport.from_dict(record, PackedMask(tensors.pop(f"mask {record['name']}"), shape)))
        for name, value in tensors.items():
            model.get_parameter(name.removeprefix("parameter ")).copy_(value)
        return layers, [ReconstructionReport(**record) for record in records["reconstructions"]]

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete a journal's own files, and the folder if nothing else is in it."""
        for file in [*folder.glob("block_*"), *folder.glob(".block_*"), folder / "run.json"]:
            file.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _tensors(self, block: int) -> Path:
        return self._folder / f"block_{block:04d}.safetensors"

    def _reports(self, block: int) -> Path:
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
