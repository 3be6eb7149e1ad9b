"""What happened to every layer, as data."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from torch import nn

from lit_prune.calibration.batches import Batch, count_sequences, count_tokens
from lit_prune.checkpoint.plain_data import typed, typed_fields
from lit_prune.errors import InputError, first_line
from lit_prune.ops import PackedMask
from lit_prune.ops.spectrum import PowerLaw

_FORMAT = 1
"""Of ``pruning.json``; docs/pruning.schema.json describes it."""
_MOST_BLOCKS = 100_000
_VERSIONED = ("lit-prune", "torch", "transformers")


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer."""

    name: str
    """Dotted module name in the model."""
    block: int
    """Index of its decoder block."""
    shape: tuple[int, int]
    """``(o, i)``."""
    asked: float
    """Sparsity asked for."""
    reached: float
    """Fraction of the weights that the mask removes."""
    output_error: float | None
    """``||X (W' - W)ᵀ||² / ||X Wᵀ||²`` on the calibration set, as the solver left the layer; None if it was not
    measured."""
    seconds: float
    """Time to score, solve and write the layer."""
    mask: PackedMask = field(repr=False)
    """Keep mask in the layout of the parameter."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """Name of the weight in the model's state dict."""
        return f"{self.name}.weight"

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the mask as plain data."""
        names = ("name", "block", "shape", "asked", "reached", "output_error", "seconds")
        return {name: getattr(self, name) for name in names} | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], mask: PackedMask, name: str = "layer") -> LayerReport:
        """Rebuild what ``as_dict`` returned; raise ``TypeError`` or ``ValueError`` that names the wrong part of it."""
        layer: LayerReport = typed({**content, "mask": mask}, cls, name)
        if not 0 <= layer.block < _MOST_BLOCKS:
            raise ValueError(f"{name}.block is {layer.block}: it must be from 0 to {_MOST_BLOCKS - 1:,}")
        for part in ("asked", "reached"):
            if not 0 <= (value := getattr(layer, part)) <= 1:
                raise ValueError(f"{name}.{part} is {value}: it must be in [0, 1]")
        if mask.shape not in (layer.shape, layer.shape[::-1]):
            raise ValueError(f"{name}.shape is {list(layer.shape)}, and its mask has {list(mask.shape)}")
        return layer


@dataclass(frozen=True)
class ReconstructionReport:
    """What training did for one block."""

    block: int
    """Index of the block."""
    before: float
    """Mean over calibration tokens of the squared distance from the dense block's output, relative to its squared norm,
    as the solver left the block."""
    after: float
    """The same after training; equal to ``before`` if it did not help, and the block stayed as it was."""
    seconds: float
    """Time of both measurements and the training."""
    vectors: list[str]
    """Names of the norms and biases that were trained beside the pruned weights."""


def changed_parameters(layers: Iterable[LayerReport], reconstructions: Iterable[ReconstructionReport]) -> list[str]:
    """Return the names of all parameters that may have changed: pruned weights, and what was trained with them."""
    return [*(layer.parameter for layer in layers), *(name for done in reconstructions for name in done.vectors)]


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a dense weight, and the power law fitted to their tail."""

    eigenvalues: list[float]
    """Of ``WᵀW``, ascending."""
    tail: PowerLaw
    """The fit."""


@dataclass(frozen=True)
class Sample:
    """What a model writes, before it is pruned and after."""

    prompt: str
    """How both begin."""
    before: str
    """How the dense model goes on."""
    after: str
    """How the pruned one does."""


Scores = dict[str, dict[str, float]]
"""By task: each metric, and its standard error as ``METRIC_stderr``."""


class TaskScores(TypedDict):
    """Scores of tasks."""

    before: Scores
    """Of the dense model."""
    after: Scores
    """Of the pruned one."""


class Evaluation(TypedDict, total=False):
    """How good the model is; without ``tasks`` if none were run, and empty if nothing was evaluated."""

    perplexity_before: float
    """Of the dense model."""
    perplexity_after: float
    """Of the pruned one."""
    seqlen: int
    """Tokens per window."""
    text: str
    """What it is measured on."""
    tasks: TaskScores
    """Of lm-evaluation-harness."""


@dataclass(frozen=True)
class ModelSize:
    """The size of a whole model, embeddings and head included; tied parameters count once."""

    parameters: int
    """Number of parameters."""
    bytes: int
    """Bytes of the parameters, stored dense."""
    bitmask_bytes: int
    """Bytes of the parameters if a pruned layer is stored as its kept weights and one bit per weight."""

    def __post_init__(self) -> None:
        """Validate."""
        if min(self.parameters, self.bytes, self.bitmask_bytes) < 1:
            raise ValueError(f"{self}: each number must be at least 1")

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, PackedMask]) -> ModelSize:
        """Measure a model whose pruned parameters have ``masks``, by parameter name."""
        parameters = list(model.parameters())
        dense = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        saved = 0
        for name, mask in masks.items():
            saved += (mask.numel - mask.kept) * model.get_parameter(name).element_size() - mask.bits.numel()
        return cls(sum(parameter.numel() for parameter in parameters), dense, dense - saved)


@dataclass
class Calibration:
    """The calibration set."""

    sequences: int
    """Number of sequences."""
    tokens: int
    """Number of tokens in all sequences together."""
    text: str | None = None
    """Name of the text; None if it is unknown."""

    def __post_init__(self) -> None:
        """Validate."""
        if not 1 <= self.sequences <= self.tokens:
            raise ValueError(f"{self}: there must be a sequence, and a token in each")

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Calibration | None:
        """Count the sequences and tokens of batches; None if there are none."""
        found = list(batches)
        return cls(sum(map(count_sequences, found)), sum(map(count_tokens, found))) if found else None


class _Method(TypedDict):
    class_path: str
    init_args: dict[str, Any]


class _Plan(TypedDict):
    """What every plan has, and a report speaks of."""

    pattern: _Method
    scorer: _Method | None
    allocator: _Method
    solver: _Method
    reconstruction: _Method | None
    correction: float


@dataclass(frozen=True)
class Recipe:
    """How a run was started."""

    command: str
    """The command line."""
    config: str
    """The whole configuration, as YAML."""
    base_model: str | None = None
    """Name of the dense model on the hub; None if it came from elsewhere."""
    datasets: list[str] = field(default_factory=list)
    """Names on the hub of the sets that calibrated and trained it."""
    license: str | None = None
    """Licence of the dense model, as its model card names it."""


@dataclass
class PruningReport:
    """What a run did: by layer, by stage, and before and after."""

    identity: dict[str, Any]
    """``plan`` as plain data, and the fingerprints of ``model`` and ``data``."""
    layers: list[LayerReport] = field(default_factory=list)
    """The pruned layers, in the order of the model."""
    reconstructions: list[ReconstructionReport] = field(default_factory=list)
    """What training did for each block, if the plan has a reconstruction."""
    allocation: dict[str, float] = field(default_factory=dict)
    """Sparsity of every layer by name, as the allocator gave it for the plan's own sparsity."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage: ``record``, ``calibrate``, ``solve``, ``reconstruct``, ``propagate``."""
    peak_memory: int | None = None
    """Peak memory of the process (of the GPU if one is used), in bytes."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the allocator measured of every layer's weight, by name; empty if it measures nothing."""
    cached: list[str] = field(default_factory=list)
    """Names of the files of ``plan.cache`` that were read in place of a computation."""
    size: ModelSize | None = None
    """The size of the whole model; None in reports of older versions."""
    calibration: Calibration | None = None
    """The calibration set; None if the plan needs no data."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Filled in by whoever evaluates."""
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    """Of a few layers, by name."""
    samples: list[Sample] = field(default_factory=list)
    """What the model writes."""
    recipes: list[Recipe] = field(default_factory=list)
    """How to do it again: the runs that made the model, in order."""
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Perplexity of each validation text in the training that followed: (optimizer step, perplexity)."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Day of the pruning, such as ``2026-11-24``; empty in reports of older versions."""
    versions: dict[str, str] = field(default_factory=versions)
    """Versions of the packages that the result depends on."""

    @property
    def masks(self) -> dict[str, PackedMask]:
        """Keep masks by parameter name, one bit per weight, in the layout of the parameters."""
        return {layer.parameter: layer.mask for layer in self.layers}

    @property
    def changed(self) -> list[str]:
        """Names of all parameters that the run may have changed: the pruned weights, and what was trained with them."""
        return changed_parameters(self.layers, self.reconstructions)

    @property
    def sparsity(self) -> float:
        """Fraction of all targeted weights that was removed."""
        return weighted(self.layers, "reached")

    def sparsity_by_block(self) -> dict[int, float]:
        """Return the fraction of each block's targeted weights that was removed, by the block's index."""
        return {block: weighted(layers, "reached") for block, layers in self.blocks()}

    def mask_change(self, before: PruningReport) -> float:
        """Return the fraction of all weights that are kept now and were not before, or the other way round."""
        earlier = {name: mask.to("cpu").unpack() for name, mask in before.masks.items()}
        changed = sum(int((mask.to("cpu").unpack() != earlier[name]).sum()) for name, mask in self.masks.items())
        return changed / sum(layer.numel for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data: the content of ``pruning.json``."""
        return {
            "format": _FORMAT,
            "sparsity": self.sparsity,
            "evaluation": self.evaluation,
            "validation": {text: [list(point) for point in curve] for text, curve in self.validation.items()},
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "peak_memory": self.peak_memory,
            "size": asdict(self.size) if self.size else None,
            "calibration": asdict(self.calibration) if self.calibration else None,
            **self.identity,
            "allocation": self.allocation,
            "metrics": self.metrics,
            "cached": self.cached,
            "spectra": {
                name: {"eigenvalues": spectrum.eigenvalues, "tail": spectrum.tail._asdict()}
                for name, spectrum in self.spectra.items()
            },
            "samples": [asdict(sample) for sample in self.samples],
            "recipes": [asdict(recipe) for recipe in self.recipes],
            "date": self.date,
            "versions": self.versions,
            "layers": [layer.as_dict() for layer in self.layers],
            "reconstructions": [asdict(done) for done in self.reconstructions],
        }

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], masks: Mapping[str, PackedMask], source: str = "the report of this model"
    ) -> PruningReport:
        """Rebuild a report from ``as_dict`` and the masks by layer name.

        Args:
            content: plain data, from a file or a checkpoint of anyone's.
            masks: of all its layers.
            source: of the content, for errors.

        Raises:
            InputError: another version wrote it, in another format; or it is damaged.
        """
        check_format(content, source)
        try:
            return cls._from_dict(content, masks)
        except (TypeError, ValueError) as error:
            raise InputError(f"{source} is damaged ({first_line(error)})") from error

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any], masks: Mapping[str, PackedMask]) -> PruningReport:
        hints = {**get_type_hints(cls), **_BESIDE, "layers": list[dict[str, Any]]}
        del hints["identity"]
        parts = typed_fields(content, hints, required=[name for name in hints if name not in _LATER])
        parts.setdefault("date", "")
        identity = {name: parts[name] for name in _IDENTITY}
        typed({name: value for name, value in identity["plan"].items() if name in _Plan.__annotations__}, _Plan, "plan")
        report = cls(identity, **{name: value for name, value in parts.items() if name not in _BESIDE})
        report.layers = [_layer(f"layers[{place}]", layer, masks) for place, layer in enumerate(parts["layers"])]
        names = {layer.name for layer in report.layers}
        if len(names) < len(report.layers):
            raise ValueError("layers has a name twice")
        known = {"layers": names, "metrics": report.metrics or names, "allocation": report.allocation or names}
        for part, its in known.items():
            if lacking := masks.keys() - its:
                raise ValueError(f"{part} lacks {min(lacking)!r}, which has a mask")
        for name, spectrum in report.spectra.items():
            values = spectrum.eigenvalues
            if not values or not all(0 < value < math.inf for value in (*values, spectrum.tail.lambda_min)):
                raise ValueError(f"spectra.{name} has eigenvalues that are not above 0, or none")
        total = sum(layer.numel for layer in report.layers)
        if report.size and report.size.parameters < total:
            raise ValueError(f"size.parameters is {report.size.parameters}, and the layers have {total}")
        if report.evaluation and (lacking := _EVALUATED - report.evaluation.keys()):
            raise ValueError(f"evaluation lacks {min(lacking)!r}")
        return report

    def save(
        self,
        folder: str | Path,
        model: nn.Module,
        tokenizer: Any = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the folder that ``lit-prune prune`` writes: model, tokenizer, masks, report, page and model card.

        >>> report = prune(model, batches, plan)  # doctest: +SKIP
        >>> report.save("pruned", model, tokenizer)  # doctest: +SKIP

        Args:
            folder: Output folder.
            model: The pruned model.
            tokenizer: Its tokenizer, of transformers; None = the folder has none.
            overwrite: Replace the folder if it is an earlier result.

        Raises:
            InputError: if the folder exists and ``overwrite`` is off, or the disk has no room.
            RuntimeError: if a weight that the masks prune is not exactly zero.
        """
        from lit_prune.checkpoint.save import save_pruned
        from lit_prune.reporting.documents import render

        title = Path(getattr(model.config, "name_or_path", "") or "model").name
        return save_pruned(folder, model, tokenizer, self.masks, render(self, title), overwrite)

    def __str__(self) -> str:
        """Return the summary as a table of plain text."""
        from lit_prune.reporting.tables import as_text, summary_table

        return as_text(summary_table(self))

    def _repr_html_(self) -> str:
        """Return the summary as a table for notebooks."""
        from lit_prune.reporting.pages import render_page
        from lit_prune.reporting.summary import summary

        return render_page("summary.html", rows=summary(self))

    def blocks(self) -> list[tuple[int, list[LayerReport]]]:
        """Return the layers by block, in order."""
        indices = sorted({layer.block for layer in self.layers})
        return [(index, [layer for layer in self.layers if layer.block == index]) for index in indices]


_IDENTITY = {"plan": dict[str, Any], "model": str, "data": str}
_LATER = ("cached", "size", "calibration", "date")
"""Fields that reports of older versions lack."""
_BESIDE = {**_IDENTITY, "format": int, "sparsity": float}
"""What a file has beside the fields of the report: its identity, and what follows from the rest."""
_EVALUATED = {"perplexity_before", "perplexity_after", "seqlen", "text"}


def _layer(place: str, content: Mapping[str, Any], masks: Mapping[str, PackedMask]) -> LayerReport:
    name = content.get("name")
    if not isinstance(name, str) or name not in masks:
        raise ValueError(f"{place}.name is {name!r:.80}, which has no mask")
    return LayerReport.from_dict(content, masks[name], place)


def check_format(content: Any, source: str) -> None:
    """Raise ``InputError`` if a report was written by another version, in another format."""
    if not isinstance(content, Mapping):
        raise InputError(f"{source} holds no report, but a {type(content).__name__}")
    if content.get("format") != _FORMAT:
        versions = content.get("versions")
        writer = " ".join(str(versions.get("lit-prune", "")).split())[:80] if isinstance(versions, Mapping) else ""
        raise InputError(
            f"{source} is in format {content.get('format')!r:.80}, written by "
            f"{f'lit-prune {writer}' if writer else 'another program'}: this version, {version('lit-prune')}, "
            f"reads format {_FORMAT}; prune again, or install that version"
        )


def weighted(layers: Iterable[LayerReport], attribute: str) -> float:
    """Return the mean of a layer's attribute, weighted by the number of its weights."""
    layers = list(layers)
    total = sum(layer.numel for layer in layers)
    return sum(getattr(layer, attribute) * layer.numel for layer in layers) / total if total else 0.0
