"""On-disk journal of finished blocks, from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.batches import Batch
from lit_prune.checkpoint.files import as_json, load_tensors, save_tensors, write_atomically
from lit_prune.checkpoint.fingerprints import data_fingerprint
from lit_prune.checkpoint.plain_data import typed, typed_fields
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask, collectives
from lit_prune.reporting.report import LayerReport, ReconstructionReport, changed_parameters, versions

_BLOCK = {"run": str, "tensors": str, "layers": list[dict[str, Any]], "reconstructions": list[dict[str, Any]]}
_OWN = re.compile(r"\.?(block_\d{4,}\.(safetensors|record)|(run|allocation)\.record)(\.writing-\d+)?")
"""File names of a journal, including the partial files of an interrupted run."""
_ALLOCATION = {"allocation": dict[str, float], "metrics": dict[str, float]}
"""Fields of the records, with their types."""


class DamagedError(Exception):
    """A file whose content does not match its digest."""


@dataclass(frozen=True)
class FinishedBlock:
    """Records and tensors of one finished block, as read from the journal."""

    records: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @torch.no_grad()
    def restore(self, model: nn.Module) -> tuple[list[LayerReport], list[ReconstructionReport]]:
        """Copy the block's parameters into the model and return the block's reports."""
        layers = []
        for record in self.records["layers"]:
            weight = model.get_parameter(f"{record['name']}.weight")
            mask = PackedMask(self.tensors[f"mask {record['name']}"], tuple(weight.shape))
            layers.append(LayerReport.from_dict(record, mask))
        reconstructions = [
            typed(record, ReconstructionReport, "reconstruction") for record in self.records["reconstructions"]
        ]
        for name in changed_parameters(layers, reconstructions):
            model.get_parameter(name).copy_(self.tensors[f"parameter {name}"])
        return layers, reconstructions


class Journal:
    """A folder with the identity of the run, its allocation, and two files for each finished block.

    Every file either begins with the digest of its remaining content or has its digest stored in another file. A
    block's record names its run, so that blocks of two runs are never mixed. Rank 0 writes, and decides which blocks
    are read; every process must have access to the folder. A finished block is written in the background while the
    next block is pruned; leaving the journal's context waits for the last write.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
        """Open or start a journal.

        Args:
            folder: folder of the journal.
            identity: identity of the run, as plain data: plan, model, data and circumstances. A run resumes only from a
                journal with an equal identity.
            resume: resume from the blocks in the folder; False discards them.

        Raises:
            InputError: if the journal belongs to another plan, model, data or versions; the message names the
                differences.
        """
        self._folder = folder
        self._run = ""
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        collectives.on_first_rank(lambda: self._open({**identity, "versions": versions()}, resume))

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait until everything is written; re-raise a write error, unless another error is already propagating."""
        self._writer.shutdown()
        if error is None:
            collectives.on_first_rank(self._written)

    def _written(self) -> None:
        if self._writing:
            self._writing.result()

    def _open(self, identity: Mapping[str, Any], resume: bool) -> None:
        self._run = _digest(json.dumps(identity, sort_keys=True).encode())
        run = self._folder / "run.record"
        if not (resume and run.is_file()):
            self.remove(self._folder)
            _write_record(run, identity)
            return
        try:
            found = list(differences(_read_record(run), json.loads(as_json(identity))))
        except DamagedError as error:
            raise InputError(f"cannot resume: {error}; start again with --resume never") from error
        if found:
            raise InputError(
                f"cannot resume from {str(self._folder)!r}: {'; '.join(found[:3])}; "
                "resume with the settings of the first run, or start again with --resume never"
            )

    def allocation(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return the allocation and the allocator's metrics, by layer name; None if missing or damaged."""
        found = collectives.on_first_rank(lambda: self._intact(self._folder / "allocation.record", _ALLOCATION))
        return None if found is None else (found["allocation"], found["metrics"])

    def save_allocation(self, allocation: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Write the allocation and the allocator's metrics to the journal."""
        content = {"allocation": dict(allocation), "metrics": dict(metrics)}
        collectives.on_first_rank(lambda: _write_record(self._folder / "allocation.record", content))

    def finished(self, block: int) -> FinishedBlock | None:
        """Return a finished block; None if it is not on disk, incomplete or damaged."""
        records = collectives.on_first_rank(lambda: self._undamaged(block))
        return None if records is None else FinishedBlock(records, load_tensors(self._tensors(block)))

    def _undamaged(self, block: int) -> Any:
        records = self._intact(self._records(block), _BLOCK)
        file = self._tensors(block)
        if records is None:
            return None
        if records["run"] != self._run:  # another run wrote here at the same time
            warnings.warn(f"{str(file)!r} is of another run: the block is pruned again", stacklevel=2)
            return None
        if not (file.is_file() and _file_digest(file) == records["tensors"]):
            _warn_damaged(file)
            return None
        return records

    def save(
        self,
        block: int,
        model: nn.Module,
        layers: Sequence[LayerReport],
        reconstructions: Sequence[ReconstructionReport],
        wait: bool,
    ) -> None:
        """Start writing a finished block: its parameters and masks, then the record that marks them as complete.

        The parameters must not change afterwards. A write error is raised by the next call, or on leaving the context.

        Args:
            block: index of the block.
            model: model with the block resident in memory.
            layers: reports of the block's layers.
            reconstructions: reports of the block's reconstruction.
            wait: return only after the block is written, when nothing references its parameters any more.
        """

        def begin() -> None:
            self._written()
            names = changed_parameters(layers, reconstructions)
            tensors = {f"parameter {name}": model.get_parameter(name).detach().cpu() for name in names}
            tensors |= {f"mask {layer.name}": layer.mask.bits for layer in layers}
            records = {
                "layers": [layer.as_dict() for layer in layers],
                "reconstructions": [asdict(done) for done in reconstructions],
            }
            self._writing = self._writer.submit(self._write, block, tensors, records)
            if wait:
                self._written()

        collectives.on_first_rank(begin)

    def _write(self, block: int, tensors: Mapping[str, Tensor], records: Mapping[str, Any]) -> None:
        file = self._tensors(block)
        save_tensors(file, tensors)
        _write_record(self._records(block), {"run": self._run, "tensors": _file_digest(file), **records})

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete a journal's own files, and the folder if that leaves it empty."""
        for file in folder.iterdir() if folder.is_dir() else ():
            if _OWN.fullmatch(file.name):
                file.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    @staticmethod
    def beside(output: Path) -> Path:
        """Return the journal folder of a run that writes ``output``."""
        return output.with_name(f".{output.name}.journal")

    @staticmethod
    def check_unfinished(folder: Path, resume: str | None) -> None:
        """Raise ``InputError`` if a folder cannot be a journal, or if it has finished blocks and ``resume`` is None."""
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(f"{str(folder)!r} is a file or a link: the journal of this run needs a folder there")
        if resume is None and (blocks := len(list(folder.glob("block_*.record")))):
            raise InputError(
                f"{str(folder)!r} has {blocks} finished blocks of a stopped run: resume from them with --resume auto, "
                "or start again with --resume never"
            )

    def _tensors(self, block: int) -> Path:
        return self._folder / f"block_{block:04d}.safetensors"

    def _records(self, block: int) -> Path:
        return self._folder / f"block_{block:04d}.record"

    @staticmethod
    def _intact(path: Path, fields: Mapping[str, Any]) -> Any:
        """Return the content of a record with these fields; None if it is missing or damaged."""
        if not path.is_file():
            return None
        try:
            return typed_fields(_read_record(path), fields, required=fields)
        except (DamagedError, TypeError):
            _warn_damaged(path)
            return None


def identity_of(plan: Mapping[str, Any], model: str, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return the identity of a run: the plan and the digests of model and data."""
    return {"plan": dict(plan), "model": model, "data": data_fingerprint(batches)}


def _write_record(path: Path, content: Any) -> None:
    text = as_json(content).encode()
    write_atomically(path, lambda temporary: temporary.write_bytes(_digest(text).encode() + b"\n" + text))


def _read_record(path: Path) -> Any:
    digest, _, text = path.read_bytes().partition(b"\n")
    if digest.decode(errors="replace") != _digest(text):
        raise DamagedError(f"{str(path)!r} is damaged")
    return json.loads(text)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _warn_damaged(path: Path) -> None:
    warnings.warn(f"{str(path)!r} is damaged: its work is repeated", stacklevel=2)


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield a description of each difference between two pieces of plain data."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {before!r} and is now {now!r}"
