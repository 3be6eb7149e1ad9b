"""Data classes of the pruning report."""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypedDict, get_type_hints

import psutil
import torch
from torch import Tensor, nn

from lit_prune.calibration.batches import Batch, count_sequences, count_tokens
from lit_prune.checkpoint.plain_data import typed, typed_fields
from lit_prune.errors import InputError, first_line
from lit_prune.models.coupling import Kept
from lit_prune.models.shrink import shrink
from lit_prune.ops import PackedMask
from lit_prune.ops.spectrum import PowerLaw

_FORMAT = 1
"""Format version of ``pruning.json``; see docs/pruning.schema.json."""
_MOST_BLOCKS = 100_000
_MOST_WEIGHTS = 2**31
"""Maximum number of weights of a layer whose mask is built from indices."""
_HUB_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)?")
_ROUNDING = 1e-6
"""Maximum difference between the sparsity in a report and that of the mask."""
_VERSIONED = ("lit-prune", "torch", "transformers")


@dataclass(frozen=True)
class LayerReport:
    """Report of one pruned layer."""

    name: str
    """Dotted module name within the model."""
    block: int
    """Index of the layer's decoder block."""
    shape: tuple[int, int]
    """Shape of the weight, ``(o, i)``."""
    asked: float
    """Target sparsity of the layer."""
    reached: float
    """Actual sparsity: fraction of the weights that the mask removes."""
    output_error: float | None
    """Relative output error ``||X (W' - W)ᵀ||² / ||X Wᵀ||²`` on the calibration set, after the solver; None if not
    measured."""
    seconds: float
    """Seconds to score, solve and write the layer."""
    mask: PackedMask = field(repr=False)
    """Keep mask, in the layout of the parameter."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """Fractions that describe how the scorer works on the layer, by name; see ``Scorer.diagnose``."""
    kept_rows: list[int] | None = None
    """Indices of the rows that a structured pattern keeps; None = all."""
    kept_columns: list[int] | None = None
    """Indices of the columns that a structured pattern keeps; None = all."""

    @property
    def kept(self) -> Kept | None:
        """Rows and columns that a structured pattern keeps; None if the pattern is not structured."""
        if self.kept_rows is None and self.kept_columns is None:
            return None
        rows, columns = (None if i is None else torch.tensor(i) for i in (self.kept_rows, self.kept_columns))
        return Kept(rows, columns)

    @property
    def numel(self) -> int:
        """Number of weights in the layer."""
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """Name of the weight in the model's state dict."""
        return f"{self.name}.weight"

    def as_dict(self) -> dict[str, Any]:
        """Return everything except the mask as plain data."""
        names = ("name", "block", "shape", "asked", "reached", "output_error", "seconds", "diagnostics")
        kept = {name: getattr(self, name) for name in ("kept_rows", "kept_columns") if getattr(self, name) is not None}
        return {name: getattr(self, name) for name in names} | {"shape": list(self.shape)} | kept

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], mask: PackedMask | None, name: str = "layer") -> LayerReport:
        """Rebuild a report from ``as_dict`` and the mask; raise a ``TypeError`` or ``ValueError`` for an invalid part.

        Without a mask, it is that of the rows and columns that a structured pattern keeps, which may be all.
        """
        mask = mask or _mask_of_units(content, name)
        layer: LayerReport = typed({**content, "mask": mask}, cls, name)
        if not 0 <= layer.block < _MOST_BLOCKS:
            raise ValueError(f"{name}.block is {layer.block}: it must be from 0 to {_MOST_BLOCKS - 1:,}")
        for part in ("asked", "reached"):
            if not 0 <= (value := getattr(layer, part)) <= 1:
                raise ValueError(f"{name}.{part} is {value}: it must be in [0, 1]")
        if mask.shape not in (layer.shape, layer.shape[::-1]):
            raise ValueError(f"{name}.shape is {list(layer.shape)}, and its mask has {list(mask.shape)}")
        if abs(layer.reached - (pruned := 1 - mask.kept / mask.numel)) > _ROUNDING:
            raise ValueError(f"{name}.reached is {layer.reached}, and its mask prunes {pruned:.6f}")
        _check_above(f"{name}.output_error", layer.output_error)
        _check_above(f"{name}.seconds", layer.seconds)
        _check_above(f"{name}.diagnostics", *layer.diagnostics.values())
        return layer


@dataclass(frozen=True)
class ReconstructionReport:
    """Report of the reconstruction of one block."""

    block: int
    """Index of the block."""
    before: float
    """Error after the solver: mean over calibration tokens of the squared distance from the dense block's output,
    relative to its squared norm."""
    after: float
    """Error after training; equal to ``before`` if training did not reduce it, so that the block was not changed."""
    seconds: float
    """Seconds for both measurements and the training."""
    vectors: list[str]
    """Names of the norms and biases that were trained in addition to the kept weights."""


def changed_parameters(layers: Iterable[LayerReport], reconstructions: Iterable[ReconstructionReport]) -> list[str]:
    """Return the names of all parameters that may have changed: pruned weights, and trained norms and biases."""
    return [*(layer.parameter for layer in layers), *(name for done in reconstructions for name in done.vectors)]


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the result."""
    return {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a dense weight, and the power law fitted to their tail."""

    eigenvalues: list[float]
    """Eigenvalues of ``WᵀW``, ascending."""
    tail: PowerLaw
    """Power law fitted to the tail."""


@dataclass(frozen=True)
class Sample:
    """Generated text before and after pruning."""

    prompt: str
    """Prompt of both texts."""
    before: str
    """Continuation by the dense model."""
    after: str
    """Continuation by the pruned model."""


Scores = dict[str, dict[str, float]]
"""Scores by task: each metric, and its standard error as ``METRIC_stderr``."""


class TaskScores(TypedDict):
    """Scores of tasks before and after pruning."""

    before: Scores
    """Scores of the dense model."""
    after: Scores
    """Scores of the pruned model."""


class Evaluation(TypedDict, total=False):
    """Evaluation before and after pruning; without ``tasks`` if none were run, and empty if nothing was evaluated."""

    perplexity_before: float
    """Perplexity of the dense model."""
    perplexity_after: float
    """Perplexity of the pruned model."""
    seqlen: int
    """Tokens per window."""
    text: str
    """Description of the evaluation text."""
    tasks: TaskScores
    """Scores of lm-evaluation-harness tasks."""


@dataclass(frozen=True)
class ModelSize:
    """Size of a whole model, including embeddings and head; tied parameters count once."""

    parameters: int
    """Number of parameters."""
    bytes: int
    """Size of the parameters in bytes, stored dense."""
    bitmask_bytes: int
    """Size of the parameters in bytes, with pruned layers stored as their kept weights and one bit per weight."""

    def __post_init__(self) -> None:
        """Validate the values."""
        if min(self.parameters, self.bytes, self.bitmask_bytes) < 1:
            raise ValueError(f"{self}: each number must be at least 1")

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, PackedMask]) -> ModelSize:
        """Return the size of a model whose pruned parameters have ``masks``, by parameter name."""
        parameters = list(model.parameters())
        dense = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        saved = 0
        for name, mask in masks.items():
            saved += (mask.numel - mask.kept) * model.get_parameter(name).element_size() - mask.bits.numel()
        return cls(sum(parameter.numel() for parameter in parameters), dense, dense - saved)


@dataclass
class Calibration:
    """Size and origin of the calibration set."""

    sequences: int
    """Number of sequences."""
    tokens: int
    """Total number of tokens in all sequences."""
    text: str | None = None
    """Description of the calibration text; None if unknown."""

    def __post_init__(self) -> None:
        """Validate the values."""
        if not 1 <= self.sequences <= self.tokens:
            raise ValueError(f"{self}: there must be a sequence, and a token in each")

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Calibration | None:
        """Return the size of a calibration set, given its batches; None if there are none."""
        found = list(batches)
        return cls(sum(map(count_sequences, found)), sum(map(count_tokens, found))) if found else None


class _Method(TypedDict):
    class_path: str
    init_args: dict[str, Any]


class _Parts(TypedDict):
    """Parts of a plan that a report refers to."""

    pattern: _Method
    scorer: _Method | None
    allocator: _Method
    solver: _Method
    reconstruction: _Method | None
    correction: float


class _Plan(_Parts, total=False):
    """The same, with those that reports of older versions do not have."""

    quantize: _Method | None


@dataclass(frozen=True)
class Recipe:
    """Command and configuration of a run."""

    command: str
    """Command line of the run."""
    config: str
    """Complete configuration as YAML."""
    base_model: str | None = None
    """Name of the dense model on the hub; None if it was loaded from elsewhere."""
    datasets: list[str] = field(default_factory=list)
    """Hub names of the calibration and training data sets."""
    license: str | None = None
    """Licence of the dense model according to its model card; None if unknown."""


@dataclass
class PruningReport:
    """Report of a pruning run: results by layer, seconds by stage, and evaluation before and after."""

    identity: dict[str, Any]
    """Identity of the run: ``plan`` as plain data, and the fingerprints of ``model`` and ``data``."""
    layers: list[LayerReport] = field(default_factory=list)
    """Reports of the pruned layers, in model order."""
    reconstructions: list[ReconstructionReport] = field(default_factory=list)
    """Reports of the reconstruction of each block; empty if the plan has no reconstruction."""
    allocation: dict[str, float] = field(default_factory=dict)
    """Sparsity of every layer by name, as allocated for the plan's own sparsity."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage: ``record``, ``calibrate``, ``solve``, ``reconstruct``, ``propagate``."""
    peak_memory: int | None = None
    """Peak memory of the process (of the GPU if one is used), in bytes."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Allocator's metric of every layer's weight, by layer name; empty if the allocator uses none."""
    cached: list[str] = field(default_factory=list)
    """Names of the files in ``plan.cache`` that were read instead of recomputing their contents."""
    size: ModelSize | None = None
    """Size of the whole model; None in reports of older versions."""
    calibration: Calibration | None = None
    """Size and origin of the calibration set; None if the plan needs no data."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Evaluation before and after pruning; empty until the caller sets it."""
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    """Spectra of a few layers, by layer name."""
    samples: list[Sample] = field(default_factory=list)
    """Generated text before and after pruning."""
    recipes: list[Recipe] = field(default_factory=list)
    """Commands and configurations of the runs that produced the model, in order."""
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Perplexity of each validation text during the subsequent training: (optimizer step, perplexity) pairs."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Date of the pruning, such as ``2026-11-24``; empty in reports of older versions."""
    versions: dict[str, str] = field(default_factory=versions)
    """Versions of the packages that affect the result."""

    @property
    def masks(self) -> dict[str, PackedMask]:
        """Keep masks by parameter name, one bit per weight, in the layout of the parameters."""
        return {layer.parameter: layer.mask for layer in self.layers}

    @property
    def kept(self) -> dict[str, Kept]:
        """What every layer keeps of its weight, by layer name, if the pattern is structured; else empty."""
        return {layer.name: layer.kept for layer in self.layers if layer.kept}

    @property
    def bits(self) -> int | None:
        """Number of bits to which the kept weights are rounded; None if they are not."""
        quantize = self.identity["plan"].get("quantize")
        return quantize["init_args"].get("bits") if quantize else None

    @property
    def removed_blocks(self) -> list[int]:
        """Indices of the blocks that a structured pattern removes entirely."""
        return [index for index, layers in self.blocks() if all(layer.kept_rows == [] for layer in layers)]

    @property
    def uneven(self) -> bool:
        """Whether blocks may have other widths than each other, because the pattern is structured and allocated."""
        return bool(self.kept) and self.identity["plan"]["allocator"]["class_path"] != "Uniform"

    def smaller(self, model: nn.Module) -> nn.Module:
        """Return the smaller model that a structured pattern leaves of ``model``, which it has pruned in place.

        Raises:
            InputError: if the config of the model's family has no values for its sizes.
        """
        return shrink(model, self.kept, self.removed_blocks, self.uneven)

    @property
    def changed(self) -> list[str]:
        """Names of all parameters that may have changed: pruned weights, and norms and biases trained with them."""
        return changed_parameters(self.layers, self.reconstructions)

    @property
    def sparsity(self) -> float:
        """Fraction of all targeted weights that were removed."""
        return weighted(self.layers, "reached")

    def sparsity_by_block(self) -> dict[int, float]:
        """Return the fraction of each block's targeted weights that were removed, by block index."""
        return {block: weighted(layers, "reached") for block, layers in self.blocks()}

    @property
    def diagnostics(self) -> dict[str, float]:
        """Median over the layers of every fraction that describes how the scorer works, by name."""
        names = {name for layer in self.layers for name in layer.diagnostics}
        found = {
            name: [layer.diagnostics[name] for layer in self.layers if name in layer.diagnostics] for name in names
        }
        return {name: median(values) for name, values in sorted(found.items())}

    def mask_change(self, before: PruningReport) -> float:
        """Return the fraction of all weights whose mask differs from that in an earlier report."""
        earlier = {name: mask.to("cpu").unpack() for name, mask in before.masks.items()}
        changed = sum(int((mask.to("cpu").unpack() != earlier[name]).sum()) for name, mask in self.masks.items())
        return changed / sum(layer.numel for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, the content of ``pruning.json``."""
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
            content: plain data from an untrusted file or checkpoint.
            masks: keep masks of all layers in the report, by layer name.
            source: source of the content, for errors.

        Raises:
            InputError: if the content has another format version, or is damaged.
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
        if identity["plan"].get("quantize") and report.bits not in (8, 4):
            raise ValueError(f"plan.quantize has {report.bits!r:.80} bits: 8 or 4 are possible")
        structured = identity["plan"]["pattern"]["class_path"] == "Structured"
        report.layers = [
            _layer(f"layers[{place}]", layer, masks, structured) for place, layer in enumerate(parts["layers"])
        ]
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
        if not all(0 <= sparsity <= 1 for sparsity in (parts["sparsity"], *report.allocation.values())):
            raise ValueError("sparsity or allocation has a value outside of [0, 1]")
        _check_above("seconds or peak_memory", *report.seconds.values(), report.peak_memory)
        _check_above("reconstructions", *(v for done in report.reconstructions for v in (done.before, done.after)))
        courses = report.validation.values()
        _check_above("validation", *(value for course in courses for point in course for value in point))
        for recipe in report.recipes:
            for name in filter(None, (recipe.base_model, recipe.license, *recipe.datasets)):
                if not _HUB_NAME.fullmatch(name):
                    raise ValueError(f"recipes has {name!r:.80}, which is not a name on the hub")
        perplexities = [value for name, value in report.evaluation.items() if name.startswith("perplexity")]
        _check_above("evaluation", report.evaluation.get("seqlen", 1), *perplexities, least=1)
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
        """Write the same folder as ``lit-prune prune``: model, tokenizer, masks, report, page and model card.

        >>> report = prune(model, batches, plan)  # doctest: +SKIP
        >>> report.save("pruned", model, tokenizer)  # doctest: +SKIP

        Args:
            folder: Output folder.
            model: The pruned model.
            tokenizer: Tokenizer of the model, from transformers; None = none.
            overwrite: Replace the folder if it is an earlier result.

        Raises:
            InputError: if the folder exists and ``overwrite`` is off, or the disk lacks space.
            RuntimeError: if a weight that the masks prune is not exactly zero.
        """
        from lit_prune.checkpoint.save import save_pruned
        from lit_prune.reporting.documents import render

        title = Path(getattr(model.config, "name_or_path", "") or "model").name
        whole, masks = (self.smaller(model), {}) if self.kept else (model, self.masks)
        return save_pruned(folder, whole, tokenizer, masks, render(self, title), overwrite)

    def __str__(self) -> str:
        """Return the summary as a plain-text table."""
        from lit_prune.reporting.tables import as_text, summary_table

        return as_text(summary_table(self))

    def _repr_html_(self) -> str:
        """Return the summary as an HTML table for notebooks."""
        from lit_prune.reporting.pages import render_page
        from lit_prune.reporting.summary import summary

        return render_page("summary.html", rows=summary(self))

    def blocks(self) -> list[tuple[int, list[LayerReport]]]:
        """Return the layers grouped by block, in order."""
        indices = sorted({layer.block for layer in self.layers})
        return [(index, [layer for layer in self.layers if layer.block == index]) for index in indices]


_IDENTITY = {"plan": dict[str, Any], "model": str, "data": str}
_LATER = ("cached", "size", "calibration", "date")
"""Fields that reports of older versions lack."""
_BESIDE = {**_IDENTITY, "format": int, "sparsity": float}
"""Fields of a file in addition to those of the report: the identity, the format and derived values."""
_EVALUATED = {"perplexity_before", "perplexity_after", "seqlen", "text"}


def _check_above(name: str, *values: Any, least: float = 0) -> None:
    """Raise a ``ValueError`` if a value is below the least possible one, or infinite; None and NaN are permitted."""
    for value in values:
        if value is not None and not math.isnan(value) and not least <= value < math.inf:
            raise ValueError(f"{name} has {value}: it must be a number of at least {least}")


def _layer(place: str, content: Mapping[str, Any], masks: Mapping[str, PackedMask], structured: bool) -> LayerReport:
    name = content.get("name")
    if not isinstance(name, str) or not (structured or name in masks):
        raise ValueError(f"{place}.name is {name!r:.80}, which has no mask")
    return LayerReport.from_dict(content, masks.get(name), place)


def _mask_of_units(content: Mapping[str, Any], name: str) -> PackedMask:
    """Return the mask of the rows and columns that a layer keeps, from the content of an untrusted file."""
    shape = typed(content.get("shape"), tuple[int, int], f"{name}.shape")
    if min(shape) < 1 or shape[0] * shape[1] > min(_MOST_WEIGHTS, psutil.virtual_memory().available // 2):
        raise ValueError(f"{name}.shape is {list(shape)}: its mask does not fit into memory, or is empty")
    indices: list[Tensor | None] = []
    for part, size in zip(("kept_rows", "kept_columns"), shape, strict=True):
        kept = content.get(part)
        if kept is None:
            indices.append(None)
            continue
        kept = typed(kept, list[int], f"{name}.{part}")
        if any(not first < second for first, second in pairwise([-1, *kept, size])):
            raise ValueError(f"{name}.{part} has indices that are not ascending, or not below {size}")
        indices.append(torch.tensor(kept, dtype=torch.int64))
    return PackedMask.pack(Kept(*indices).mask(shape))


def check_format(content: Any, source: str) -> None:
    """Raise ``InputError`` if a report has the format of another version."""
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
    """Return the mean of an attribute over layers, weighted by their numbers of weights."""
    layers = list(layers)
    total = sum(layer.numel for layer in layers)
    return sum(getattr(layer, attribute) * layer.numel for layer in layers) / total if total else 0.0
