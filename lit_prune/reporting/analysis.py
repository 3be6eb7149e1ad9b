"""Analysis of how prunable each layer is: spectra, their metrics and the resulting allocations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from lit_prune.allocators import AlphaPruning, Measured
from lit_prune.allocators.base import Allocator
from lit_prune.checkpoint.fingerprints import model_fingerprint
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import Target, as_layer
from lit_prune.ops.masks import check_sparsity
from lit_prune.ops.parallel import in_parallel
from lit_prune.ops.spectrum import METRICS, PowerLaw, alpha_peak
from lit_prune.reporting.report import Spectrum
from lit_prune.sharding.block_store import store_of
from lit_prune.sharding.parameters import read_weight

_SHOWN = ("alpha_peak", "alpha_mid", "stable_rank", "entropy")


@dataclass(frozen=True)
class LayerAnalysis:
    """Metrics of one layer's spectrum."""

    name: str
    """Dotted module name within the model."""
    block: int
    """Index of the layer's decoder block."""
    shape: tuple[int, int]
    """Shape of the weight, ``(o, i)``."""
    metrics: dict[str, float]
    """Value of every metric in ``ops.spectrum.METRICS``, by name."""
    tail: PowerLaw
    """Power-law fit of ``alpha_peak``."""


@dataclass
class Analysis:
    """Analysis of the spectra of a model."""

    model: str
    """Fingerprint of the weights."""
    metric: str
    """Name of the metric from which the allocations are computed."""
    layers: list[LayerAnalysis] = field(default_factory=list)
    """Analyses of the layers, in model order."""
    allocations: dict[float, dict[str, float]] = field(default_factory=dict)
    """Sparsity of every layer by name, by target sparsity."""
    spectra: dict[str, Tensor] = field(default_factory=dict)
    """Ascending eigenvalues of the layers with a histogram, by layer name."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything except the eigenvalues as plain data, the content of ``analysis.json``."""
        return {
            "model": self.model,
            "metric": self.metric,
            "layers": [
                {
                    "name": layer.name,
                    "block": layer.block,
                    "shape": list(layer.shape),
                    "metrics": layer.metrics,
                    "tail": layer.tail._asdict(),
                }
                for layer in self.layers
            ],
            "allocations": {str(target): sparsity for target, sparsity in self.allocations.items()},
        }

    def table(self) -> Table:
        """Return a terminal table with a row per block, of means over the block's matrices."""
        table = Table(title=f"Spectra by block; sparsities allocated from {self.metric}")
        for heading in ("block", *_SHOWN, *(f"at {target:.0%}" for target in self.allocations)):
            table.add_column(heading, justify="right")
        for block in sorted({layer.block for layer in self.layers}):
            mine = [layer for layer in self.layers if layer.block == block]
            means = [sum(layer.metrics[name] for layer in mine) / len(mine) for name in _SHOWN]
            numel = [layer.shape[0] * layer.shape[1] for layer in mine]
            shares = [
                sum(sparsity[layer.name] * n for layer, n in zip(mine, numel, strict=True)) / sum(numel)
                for sparsity in self.allocations.values()
            ]
            table.add_row(str(block), *(f"{value:.3f}" for value in means), *(f"{share:.1%}" for share in shares))
        return table


def spectra_of(model: nn.Module, targets: Sequence[Target], allocator: Allocator) -> dict[str, Spectrum]:
    """Return the spectra of the first layer in the first, middle and last block; empty if the allocator uses none."""
    prior = allocator.prior if isinstance(allocator, Measured) else allocator
    if not isinstance(prior, AlphaPruning) or not targets:
        return {}
    blocks = sorted({target.block for target in targets})
    shown = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    found = {}
    for block in sorted(shown):
        target = next(target for target in targets if target.block == block)
        with store_of(model).resident(find_blocks(model)[block]):
            values = prior.spectrum(read_weight(target.module))
        found[target.name] = Spectrum([float(f"{value:.6g}") for value in values.tolist()], alpha_peak(values))
    return found


def analyze(
    model: nn.Module,
    targets: Sequence[Target],
    allocator: AlphaPruning,
    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8),
    histograms: Sequence[str] = (),
    on_layer: Callable[[int], None] = lambda done: None,
) -> Analysis:
    """Compute the spectrum of every target layer, its metrics, and the allocator's sparsities.

    Args:
        model: any causal language model; not modified.
        targets: layers of the model to analyze.
        allocator: allocator whose metric and mapping determine the allocations.
        sparsities: target sparsities to allocate for, in [0, 1).
        histograms: shell patterns over layer names; the eigenvalues of matching layers are kept.
        on_layer: callback invoked with the number of layers done.

    Raises:
        InputError: if a pattern matches no layer, or a target is not a sparsity.
        NumericalError: if a layer's spectrum is degenerate; names the layer.
    """
    for sparsity in sparsities:
        check_sparsity(sparsity, "a target sparsity")
    for pattern in histograms:
        if not any(fnmatchcase(target.name, pattern) for target in targets):
            raise InputError(f"histograms: {pattern!r} matches no layer; their names are like {targets[0].name!r}")
    result = Analysis(model=model_fingerprint(model), metric=allocator.metric)

    def examine(target: Target) -> tuple[LayerAnalysis, Tensor]:
        try:
            values = allocator.spectrum(read_weight(target.module))
            metrics = {name: metric(values) for name, metric in METRICS.items()}
            return LayerAnalysis(target.name, target.block, target.shape, metrics, alpha_peak(values)), values
        except NumericalError as error:
            raise NumericalError(f"{target.name}: {error}; leave it out with plan.exclude") from error

    store = store_of(model)
    for block in find_blocks(model):
        with store.resident(block):
            for layer, values in in_parallel(examine, [target for target in targets if target.block == block.index]):
                result.layers.append(layer)
                if any(fnmatchcase(layer.name, pattern) for pattern in histograms):
                    result.spectra[layer.name] = values
                on_layer(len(result.layers))
    metrics_of_all = torch.tensor([layer.metrics[allocator.metric] for layer in result.layers], dtype=torch.float64)
    layers = [as_layer(target) for target in targets]
    result.allocations = {sparsity: allocator.spread(layers, metrics_of_all, sparsity) for sparsity in sparsities}
    return result
