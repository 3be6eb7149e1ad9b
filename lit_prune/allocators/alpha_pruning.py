"""AlphaPruning: sparsities from the shape of each weight's spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lit_prune.allocators.base import Allocator, Layer, check_bounds, meet_budget
from lit_prune.errors import InputError, NumericalError
from lit_prune.ops.parallel import in_parallel
from lit_prune.ops.spectrum import METRICS, eigenvalues, windowed_eigenvalues

MetricName = Literal[
    "alpha_peak",
    "alpha_peak_as_released",
    "alpha_mid",
    "alpha_full",
    "alpha_hat",
    "stable_rank",
    "entropy",
    "norm",
    "log_norm",
    "spectral_norm",
    "log_alpha_norm",
]


@final
@dataclass(frozen=True)
class AlphaPruning(Allocator):
    """``r = η [(α - α_min) / (α_max - α_min) 2ε + 1 - ε]``: lower sparsity for spectra with a heavy tail.

    Lu et al., "AlphaPruning", 2024. The metric α of every matrix is computed from its eigenvalues; by default the
    mean over a block's matrices is mapped, and all of them get the block's sparsity. η is chosen to meet the budget;
    values outside the bounds are clipped and the rest redistributed until the parameter-weighted mean is exact. Equal
    metrics result in uniform sparsity.

    .. code-block:: yaml

        allocator: {class_path: AlphaPruning, init_args: {metric: alpha_peak, epsilon: 0.2}}
    """

    metric: MetricName = "alpha_peak"
    """Metric of the spectrum, α in the formula: of its shape, or, for comparison, of its scale (the norms)."""
    epsilon: float = 0.2
    """Spread of the sparsities around the target, as a fraction of the target, in [0, 1)."""
    mapping: Literal["block", "matrix", "mixed"] = "block"
    """Unit whose metric is mapped: the mean of each ``block``, each ``matrix``, or ``mixed``: blocks first, then the
    matrices of a block around its sparsity."""
    windows: bool = False
    """Compute the metric from the pooled spectra of square windows (FARMS) instead of the spectrum of the whole
    matrix."""
    values: str | None = None
    """``.npy`` file with the metric of every matrix in model order, such as the files published with the paper; null =
    computed from the weights."""
    min_sparsity: float = 0.0
    """Lowest sparsity of a layer."""
    max_sparsity: float = 0.99
    """Highest sparsity of a layer."""
    _read: Tensor | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        """Validate the arguments, and read ``values``."""
        if self.metric not in METRICS:
            raise InputError(f"metric is {self.metric!r}: it must be one of {', '.join(METRICS)}")
        if not 0 <= self.epsilon < 1:
            raise InputError(f"epsilon is {self.epsilon!r}: it must be in [0, 1), such as 0.2")
        if self.mapping not in ("block", "matrix", "mixed"):
            raise InputError(f"mapping is {self.mapping!r}: it must be 'block', 'matrix' or 'mixed'")
        check_bounds(self.min_sparsity, self.max_sparsity)
        if self.values is not None:
            object.__setattr__(self, "_read", _read(self.values))

    @property
    def metric_name(self) -> str | None:
        """Name of the metric and of the spectrum that it is computed from; None if ``values`` is given."""
        return None if self._read is not None else f"{self.metric}{'-windows' if self.windows else ''}"

    def measure(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return the metric of every layer by name, computed from its weight."""
        return {layer.name: value for layer, value in zip(layers, in_parallel(self._value, layers), strict=True)}

    def allocate(self, layers: Sequence[Layer], target: float) -> dict[str, float]:
        """Return the sparsity of every layer by name; see ``Allocator.allocate``.

        Raises:
            InputError: if the number of metrics in ``values`` differs from the number of matrices in the model.
            NumericalError: if a weight is zero, of rank one or has a flat spectrum, so that no power law fits it.
        """
        return self.spread(layers, self.metrics(layers), target)

    def spread(self, layers: Sequence[Layer], metrics: Tensor, target: float) -> dict[str, float]:
        """Return the sparsity of every layer by name, from precomputed metrics ``[layers]``."""
        blocks = torch.tensor([layer.block for layer in layers])
        _, block_of = blocks.unique(return_inverse=True)
        ratios = linear_mapping(metrics if self.mapping == "matrix" else _block_means(metrics, block_of), self.epsilon)
        if self.mapping == "mixed":
            for block in block_of.unique():
                ratios[block_of == block] *= linear_mapping(metrics[block_of == block], self.epsilon)
        proposed = {layer.name: ratio for layer, ratio in zip(layers, ratios.tolist(), strict=True)}
        return meet_budget(layers, proposed, target, self.min_sparsity, self.max_sparsity)

    def metrics(self, layers: Sequence[Layer]) -> Tensor:
        """Return the metric of every layer, ``[layers]`` float64; known metrics are not recomputed."""
        if self._read is not None:
            if len(self._read) != len(layers):
                raise InputError(
                    f"allocator.values is {self.values!r}: it has {len(self._read)} values and the model has "
                    f"{len(layers)} layers to prune, so it belongs to another model"
                )
            return self._read.clone()
        known = {layer.name: layer.metric for layer in layers if layer.metric is not None}
        known |= self.measure([layer for layer in layers if layer.name not in known])
        return torch.tensor([known[layer.name] for layer in layers], dtype=torch.float64)

    def spectrum(self, weight: Tensor) -> Tensor:
        """Return the ascending eigenvalues that the metric is computed from: of the whole matrix, or of its windows."""
        return windowed_eigenvalues(weight) if self.windows else eigenvalues(weight)

    def _value(self, layer: Layer) -> float:
        try:
            return METRICS[self.metric](self.spectrum(layer.read()))
        except NumericalError as error:
            raise NumericalError(f"{layer.name}: {error}; leave it out with plan.exclude") from error


def linear_mapping(metrics: Tensor, epsilon: float) -> Tensor:
    """Map metrics linearly to ``[1 - ε, 1 + ε]``; map all of them to 1 if they are equal."""
    low, high = metrics.min(), metrics.max()
    if high == low:
        return torch.ones_like(metrics)
    return (metrics - low) / (high - low) * 2 * epsilon + 1 - epsilon


def _block_means(metrics: Tensor, block_of: Tensor) -> Tensor:
    """Replace each layer's metric by the unweighted mean over its block's matrices."""
    sums = torch.zeros(int(block_of.max()) + 1, dtype=metrics.dtype).index_add(0, block_of, metrics)
    return (sums / block_of.bincount())[block_of]


def _read(path: str) -> Tensor:
    try:
        values = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"allocator.values is {path!r}: it cannot be read as .npy ({error})") from error
    tensor = torch.from_numpy(np.asarray(values, dtype=np.float64)).flatten()
    if not len(tensor) or not tensor.isfinite().all():
        raise InputError(f"allocator.values is {path!r}: it must hold finite numbers, one for each matrix")
    return tensor
