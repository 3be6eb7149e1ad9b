"""What happened to every layer, as data."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import repeat
from statistics import fmean
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rich.table import Table

from lit_prune.errors import InputError, first_line
from lit_prune.models.sparse import Speed
from lit_prune.ops import PackedMask
from lit_prune.ops.spectrum import PowerLaw

_FORMAT = 1
"""Of ``pruning.json``; docs/pruning.schema.json describes it."""
_FILE = "pruning.json"
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
    """``||X (W' - W)ᵀ||² / ||X Wᵀ||²`` on the calibration set, as the solver left the layer; None where it was not
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
    def from_dict(cls, content: Mapping[str, Any], mask: PackedMask) -> LayerReport:
        """Rebuild what ``as_dict`` returned."""
        return cls(**{**content, "shape": tuple(content["shape"])}, mask=mask)


@dataclass(frozen=True)
class ReconstructionReport:
    """What training did for one block."""

    block: int
    """Index of the block."""
    before: float
    """Mean over calibration tokens of the squared distance from the dense block's output, relative to its squared norm,
    as the solver left the block."""
    after: float
    """The same after training; equal to ``before`` where it did not help, and the block stayed as it was."""
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


@dataclass(frozen=True)
class Recipe:
    """How a run was started."""

    command: str
    """The command line."""
    config: str
    """The whole configuration, as YAML."""
    base_model: str | None = None
    """Name of the dense model on the hub; None where it came from elsewhere."""
    datasets: list[str] = field(default_factory=list)
    """Names on the hub of the sets that calibrated and trained it."""


@dataclass
class PruningReport:
    """What a run did: by layer, by stage, and before and after."""

    identity: dict[str, Any]
    """``plan`` as plain data, and the fingerprints of ``model`` and ``data``."""
    layers: list[LayerReport] = field(default_factory=list)
    """The pruned layers, in the order of the model."""
    reconstructions: list[ReconstructionReport] = field(default_factory=list)
    """What training did for each block, where the plan has a reconstruction."""
    allocation: dict[str, float] = field(default_factory=dict)
    """Sparsity of every layer by name, as the allocator gave it for the plan's own sparsity."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage: ``record``, ``calibrate``, ``solve``, ``reconstruct``, ``propagate``."""
    peak_memory: int | None = None
    """Peak memory of the process (of the GPU where one is used), in bytes."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the allocator measured of every layer's weight, by name; empty where it measures nothing."""
    cached: list[str] = field(default_factory=list)
    """Names of the files of ``plan.cache`` that were read in place of a computation."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """``perplexity_before``, ``perplexity_after``, ``seqlen``, ``text``, and ``tasks``, the scores ``before`` and
    ``after``: filled in by whoever evaluates."""
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    """Of a few layers, by name."""
    samples: list[Sample] = field(default_factory=list)
    """What the model writes."""
    recipes: list[Recipe] = field(default_factory=list)
    """How to do it again: the runs that made the model, in order."""
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Perplexity of each validation text in the training that followed: (optimizer step, perplexity)."""

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
        return _weighted(self.layers, "reached")

    def sparsity_by_block(self) -> dict[int, float]:
        """Return the fraction of each block's targeted weights that was removed, by the block's index."""
        return {block: _weighted(layers, "reached") for block, layers in self.blocks()}

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
            "versions": versions(),
            "layers": [layer.as_dict() for layer in self.layers],
            "reconstructions": [asdict(done) for done in self.reconstructions],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], masks: Mapping[str, PackedMask]) -> PruningReport:
        """Rebuild a report from ``as_dict`` and the masks by layer name.

        Raises:
            InputError: another version wrote it, in another format; or it is damaged.
        """
        check_format(content)
        try:
            return cls._from_dict(content, masks)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise InputError(f"the report of this model, {_FILE}, is damaged ({reason})") from error

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any], masks: Mapping[str, PackedMask]) -> PruningReport:
        known = cls(identity={"plan": {}, "model": "", "data": ""})
        if unknown := content.keys() - known.as_dict().keys():
            raise ValueError(f"it has the unknown field {sorted(unknown)[0]!r}")
        report = cls(
            identity={name: content[name] for name in ("plan", "model", "data")},
            layers=[LayerReport.from_dict(layer, masks[layer["name"]]) for layer in content["layers"]],
            reconstructions=[ReconstructionReport(**done) for done in content["reconstructions"]],
            allocation=dict(content["allocation"]),
            metrics=dict(content["metrics"]),
            cached=content.get("cached", []),  # newer than the format
            spectra={
                name: Spectrum(spectrum["eigenvalues"], PowerLaw(**spectrum["tail"]))
                for name, spectrum in content["spectra"].items()
            },
            samples=[Sample(**sample) for sample in content["samples"]],
            recipes=[Recipe(**recipe) for recipe in content["recipes"]],
            seconds=dict(content["seconds"]),
            peak_memory=content["peak_memory"],
            evaluation=dict(content["evaluation"]),
            validation={
                text: [(step, perplexity) for step, perplexity in curve]
                for text, curve in content["validation"].items()
            },
        )
        for part in (report, *report.layers, *report.reconstructions, *report.samples, *report.recipes):
            _check_types(part)
        return report

    @property
    def method(self) -> str:
        """The methods of the plan in a few words, such as ``Wanda + SparseGPT, AlphaPruning``."""
        plan = self.identity["plan"]
        named = [plan[part]["class_path"] for part in ("scorer", "solver") if plan[part] is not None]
        how = [" + ".join(name for name in named if name != "Zero")]
        how += [plan["allocator"]["class_path"]] if plan["allocator"]["class_path"] != "Uniform" else []
        how += [f"correction {plan['correction']}"] if plan["correction"] else []
        return ", ".join([*how, *(["reconstruction"] if self.reconstructions else [])])

    def headline(self) -> dict[str, str]:
        """Return the few numbers that matter most, by what they are."""
        found = {"sparsity": f"{self.sparsity:.2%}", "method": self.method}
        if "perplexity_before" in self.evaluation:
            before, after = self.evaluation["perplexity_before"], self.evaluation["perplexity_after"]
            found["perplexity"] = f"{before:,.2f} → {after:,.2f}"
        found["minutes"] = f"{sum(self.seconds.values()) / 60:.1f}"
        return found

    def summary(self) -> list[tuple[str, str]]:
        """Return the run in a few lines: (what, how much)."""
        lines = [("sparsity of the targeted weights", f"{self.sparsity:.4%}"), ("layers", str(len(self.layers)))]
        if "perplexity_before" in self.evaluation:
            text = f"perplexity, {self.evaluation['text']}, windows of {self.evaluation['seqlen']} tokens"
            before, after = self.evaluation["perplexity_before"], self.evaluation["perplexity_after"]
            lines.append((text, f"{before:.2f} before, {after:.2f} after"))
        for task, metric, (before, after) in scores_of(self.evaluation.get("tasks", {})):
            lines.append((f"{task}, {metric}", f"{before} before, {after} after"))
        if self.reconstructions:
            before, after = (
                fmean(getattr(done, when) for done in self.reconstructions) for when in ("before", "after")
            )
            lines.append(("mean block error before and after reconstruction", f"{before:.4f}, {after:.4f}"))
        lines += [(f"{stage} seconds", f"{seconds:.1f}") for stage, seconds in self.seconds.items()]
        lines += [("read from the cache", name) for name in self.cached]
        if self.peak_memory is not None:
            lines.append(("peak memory", f"{self.peak_memory / 2**30:.2f} GiB"))
        return lines

    def blocks(self) -> list[tuple[int, list[LayerReport]]]:
        """Return the layers by block, in order."""
        indices = sorted({layer.block for layer in self.layers})
        return [(index, [layer for layer in self.layers if layer.block == index]) for index in indices]

    def table(self) -> Table:
        """Return a table for a terminal: a row per block."""
        table = Table(title="Pruned blocks")
        headings = ["block", "layers", "weights", "sparsity", "worst output error", "seconds"]
        reconstructed = {done.block: f"{done.before:.4f} to {done.after:.4f}" for done in self.reconstructions}
        if reconstructed:
            headings.append("reconstructed, error")
        for heading in headings:
            table.add_column(heading, justify="right")
        for index, layers in self.blocks():
            worst = max(layers, key=lambda layer: layer.output_error or 0.0)
            name = worst.name.rsplit(".", 1)[-1]
            table.add_row(
                str(index),
                str(len(layers)),
                f"{sum(layer.numel for layer in layers):,}",
                f"{_weighted(layers, 'reached'):.2%}",
                "not measured" if worst.output_error is None else f"{worst.output_error:.4f} {name}",
                f"{sum(layer.seconds for layer in layers):.1f}",
                *([reconstructed[index]] if reconstructed else []),
            )
        return table

    def summary_table(self) -> Table:
        """Return the summary as a table for a terminal."""
        table = Table(title="Summary", show_header=False)
        for what, value in self.summary():
            table.add_row(what, value)
        return table


def _check_types(part: Any) -> None:
    """Raise ``TypeError`` that names the first field of a dataclass whose value is not of its type."""
    for name, hint in get_type_hints(type(part)).items():
        if not _fits(getattr(part, name), hint):
            raise TypeError(f"{name} is {getattr(part, name)!r:.80}")


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether plain data is of a type, its elements included."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is Any or not isinstance(value, kind):
        return kind is Any
    parts: Iterable[tuple[Any, Any]] = ()
    if kind is dict:
        parts = [pair for item in value.items() for pair in zip(item, inner, strict=True)]
    elif kind in (list, tuple):
        parts = zip(value, inner if kind is tuple else repeat(inner[0]), strict=False)
    return (kind is not tuple or len(value) == len(inner)) and all(_fits(part, its) for part, its in parts)


def check_format(content: Mapping[str, Any]) -> None:
    """Raise ``InputError`` where another version wrote a report, in another format."""
    if not isinstance(content, Mapping):
        raise InputError(f"{_FILE} holds no report, but {type(content).__name__}")
    if content.get("format") != _FORMAT:
        writer = content.get("versions", {}).get("lit-prune", "another program")
        raise InputError(
            f"a report is in format {content.get('format')!r}, written by lit-prune {writer}: this version, "
            f"{version('lit-prune')}, reads format {_FORMAT}; prune again, or install that version"
        )


def scores_table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return scores of tasks for a terminal: by column, task and metric, a standard error beside each."""
    table = Table(title="Tasks")
    for column in ("task", "metric", *columns):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metric, values in scores_of(columns):
        table.add_row(task, metric, *values)
    return table


def speed_table(figures: Iterable[Speed]) -> Table:
    """Return the times of layers for a terminal."""
    table = Table(title="One layer of each shape")
    for column in ("layer", "outputs x inputs", "zeros", "tokens", "form", "dense ms", "sparse ms", ""):
        table.add_column(column, justify="left" if column in ("layer", "form", "") else "right")
    for figure in figures:
        table.add_row(
            figure.layer.rsplit(".", 1)[-1],
            f"{figure.shape[0]} x {figure.shape[1]}",
            f"{figure.sparsity:.0%}",
            str(figure.tokens),
            figure.form,
            f"{1e3 * figure.dense:.3f}",
            f"{1e3 * figure.sparse:.3f}",
            figure.verdict,
        )
    return table


def scores_of(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[tuple[str, str, list[str]]]:
    """Return every task and metric with its scores as text, one for each column."""
    found = []
    for task, metrics in next(iter(columns.values()), {}).items():
        for metric in (name for name in metrics if not name.endswith("_stderr")):
            values = [
                f"{scores[task][metric]:.4f} ± {scores[task].get(f'{metric}_stderr', float('nan')):.4f}"
                for scores in columns.values()
            ]
            found.append((task, metric, values))
    return found


def _weighted(layers: Iterable[LayerReport], attribute: str) -> float:
    layers = list(layers)
    total = sum(layer.numel for layer in layers)
    return sum(getattr(layer, attribute) * layer.numel for layer in layers) / total if total else 0.0
