"""Streaming statistics of one layer's inputs, collected by calibration for scorers and solvers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import collectives, linalg
from lit_prune.ops.precision import working

GradientNorm = Literal["l1", "l2"]
"""Norm of gradients over samples: the sum of their absolute values, or the root of the sum of their squares."""
Factor = TypeVar("Factor")
NORM_FLOOR = 1e-8
"""Constant added to input norms, to avoid division by zero for dead inputs."""
DRIFT_DAMPING = 0.1
"""Damping of the drift correction: added to the diagonal of the normalised Gram matrix, as a fraction of its mean."""
COLLECTABLE = frozenset({"input_sq_norm", "gram", "gradient", "drift", "output_target"})
"""Statistics that calibration can collect, which a method requests in its ``needs``."""


class LayerStats:
    """Moments of a layer's inputs, summed over batches in float32.

    Layers with the same input share one object, and so one Gram matrix and its factorisation.
    """

    def __init__(self, needs: frozenset[str] = frozenset({"gram"})) -> None:
        """Initialize empty statistics; ``needs`` is a part of ``COLLECTABLE``."""
        if not needs <= COLLECTABLE:
            raise InputError(f"needs is {sorted(needs)}: only {sorted(COLLECTABLE)} can be collected")
        self.needs = needs
        self.sequences = 0
        """Number of calibration sequences seen."""
        self.tokens = 0
        """Number of input vectors seen."""
        self._gram: Tensor | None = None  # upper triangle
        self._mirrored = False  # whether the lower triangle is up to date
        self._sum_sq: Tensor | None = None
        self._drift: Tensor | None = None
        self._output_target: Tensor | None = None
        self._gradients: Mapping[str, Tensor] = {}
        self._factors: dict[tuple[str, float], Any] = {}
        self._last_use = False

    @classmethod
    def from_inputs(cls, inputs: Tensor, gradients: Tensor | None = None) -> LayerStats:
        """Return the statistics of tensors.

        >>> stats = LayerStats.from_inputs(torch.ones(2, 3, 4))  # two sequences of three tokens, four inputs
        >>> stats.gram[0, 1].item(), stats.input_sq_norm[0].item()
        (6.0, 3.0)

        Args:
            inputs: inputs of the layer, ``[sequences, t, i]``, or ``[t, i]`` for one sequence.
            gradients: gradients of the loss of each sample, ``[samples, o, i]``, for methods that need them.
        """
        if inputs.dim() == 2:
            inputs = inputs.unsqueeze(0)
        if inputs.dim() != 3:
            raise InputError(f"inputs have the shape {tuple(inputs.shape)}: [sequences, tokens, inputs] is needed")
        stats = cls(frozenset({"gram"}))
        stats.update(inputs, sequences=inputs.shape[0])
        if gradients is None:
            return stats
        return stats.with_gradient({"l1": gradients.abs().sum(0), "l2": gradients.square().sum(0).sqrt()})

    def update(
        self,
        inputs: Tensor,
        sequences: int,
        dense_inputs: Tensor | None = None,
        output_target: Tensor | None = None,
    ) -> None:
        """Add inputs ``[..., i]`` that belong to ``sequences`` calibration sequences.

        Args:
            inputs: inputs of the layer in the model as pruned so far.
            sequences: number of sequences that the inputs come from.
            dense_inputs: inputs of the layer in the dense model, in the same order; for ``drift``.
            output_target: ``[..., o]``, by how much the outputs should differ from those of the dense weight on these
                inputs, plus ``strength`` (see ``correct_drift``) times the dense model's outputs without the bias.
        """
        rows = _rows(inputs)
        self.sequences += sequences
        self.tokens += rows.shape[0]
        self._factors.clear()
        if "gram" in self.needs:
            if self._gram is None:
                self._gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            linalg.add_upper_gram(self._gram, rows)
            self._mirrored = False
        elif "input_sq_norm" in self.needs:
            sum_sq = rows.square().sum(0)
            self._sum_sq = sum_sq if self._sum_sq is None else self._sum_sq.add_(sum_sq)
        if "drift" in self.needs and dense_inputs is not None:
            if self._drift is None:
                self._drift = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._drift.addmm_(rows.T, _rows(dense_inputs) - rows)
        if output_target is not None:
            target = _rows(output_target).to(rows)
            if self._output_target is None:
                self._output_target = rows.new_zeros(target.shape[1], rows.shape[1])
            self._output_target.addmm_(target.T, rows)

    def merge(self, other: LayerStats) -> None:
        """Add the statistics of the same layer from another process, or another part of the data."""
        self.sequences += other.sequences
        self.tokens += other.tokens
        self._factors.clear()
        for name in ("_gram", "_sum_sq", "_drift", "_output_target"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs.clone() if mine is None else mine + theirs.to(mine.device))
        self._mirrored = False

    def add_processes(self, zeros: Tensor, outputs: int, drifts: Collection[str]) -> None:
        """All-reduce the statistics of the same layer over all processes; every process must call this method.

        Args:
            zeros: zeros ``[i]``, with the dtype and device of the sums, for a process that has seen no input.
            outputs: number of outputs of the layer.
            drifts: which of ``drift`` and ``output_target`` were collected on any process.
        """
        inputs = len(zeros)
        shapes: dict[str, list[int]] = {}
        if "gram" in self.needs:
            shapes["_gram"] = [inputs, inputs]
        elif "input_sq_norm" in self.needs:
            shapes["_sum_sq"] = [inputs]
        shapes |= {"_drift": [inputs, inputs]} if "drift" in drifts else {}
        shapes |= {"_output_target": [outputs, inputs]} if "output_target" in drifts else {}
        for name, shape in shapes.items():
            mine = getattr(self, name)
            setattr(self, name, collectives.all_reduce(zeros.new_zeros(shape) if mine is None else mine))
        self._mirrored = False
        counts = collectives.all_reduce(torch.tensor([self.sequences, self.tokens]))
        self.sequences, self.tokens = counts.tolist()
        self._factors.clear()

    @classmethod
    def pooled(cls, parts: Sequence[LayerStats]) -> LayerStats:
        """Return the statistics of the inputs of several layers, combined."""
        whole = cls(parts[0].needs)
        for part in parts:
            whole.merge(part)
        return whole

    def with_gradient(self, norms: Mapping[str, Tensor]) -> LayerStats:
        """Return a copy with one layer's gradient norms ``[o, i]``; everything else, including factors, is shared."""
        mine = copy.copy(self)
        mine._gradients = norms
        return mine

    def gradient(self, norm: GradientNorm) -> Tensor:
        """Return the norm over samples of the gradient of every weight, ``[o, i]``."""
        if norm not in self._gradients:
            raise InputError(f"no {norm} norm of gradients was collected: add 'gradient' to the method's needs")
        return self._gradients[norm]

    def check_finite(self, layer: str) -> None:
        """Raise a ``NumericalError`` that names the layer if an input was NaN or infinite."""
        if self.needs & {"gram", "input_sq_norm"} and self.tokens and not self._sums().isfinite().all():
            raise NumericalError(f"the inputs of {layer} hold NaN or Inf, or overflow float32 when squared")

    @property
    def gram(self) -> Tensor:
        """Gram matrix ``XᵀX`` ``[i, i]``, summed over all tokens."""
        if self._gram is None:
            raise InputError(
                "no Gram matrix is here: add 'gram' to the method's needs, and calibrate it; inverse_cholesky with "
                "take_gram may have put its factor there"
            )
        if not self._mirrored:
            linalg.mirror(self._gram)
            self._mirrored = True
        return self._gram

    @property
    def input_sq_norm(self) -> Tensor:
        """Squared norm ``‖X_j‖²`` ``[i]`` of each input, averaged over sequences as in the Wanda reference."""
        return self._sums() / self.sequences

    def _sums(self) -> Tensor:
        if self._gram is not None:
            return self._gram.diagonal()
        if self._sum_sq is None:
            raise InputError(
                "no input norms were collected: add 'input_sq_norm' to the method's needs, and calibrate it"
            )
        return self._sum_sq

    def correct_drift(self, weight: Tensor, strength: float) -> Tensor:
        """Return the weight ``[o, i]`` that compensates for the drift of the model from the dense one.

        With these inputs X and the dense model's inputs D, it fits the outputs ``D Wᵀ`` by the least-squares solution
        ``W + W (D - X)ᵀX (XᵀX)⁻¹``, damped at unit input norms. The full correction overfits the calibration set, so
        only the fraction ``strength`` of it is applied. Example: one input that has shrunk by half, X = (1, 1) and D =
        (2, 2), without damping: ``(D - X)ᵀX = 2``, ``XᵀX = 2``, so the full correction doubles the weight.

        For a layer with targets T of its outputs, which contain ``strength`` times the dense model's outputs ``D Wᵀ``
        and any other desired change of the outputs, it is ``W + (TᵀX - strength W XᵀX) (XᵀX)⁻¹``.

        Args:
            weight: ``[o, i]``, any floating dtype.
            strength: fraction of the correction for the drift of the inputs to apply, in [0, 1].

        Returns:
            ``[o, i]`` float32 or float64; ``weight`` itself if no drift was collected.
        """
        dense = working(weight)
        if self._output_target is not None:
            pull = self._output_target.to(dense)
            if strength:
                pull = pull - strength * (dense @ self.gram.to(dense))
        elif strength and self._drift is not None:
            pull = strength * (dense @ self._drift.T.to(dense))
        else:
            return weight
        norm, factor = self._once(("drift", DRIFT_DAMPING), self._drift_factor)
        return dense + torch.cholesky_solve((pull / norm.to(dense)).T, factor.to(dense)).T / norm.to(dense)

    def _drift_factor(self) -> tuple[Tensor, Tensor]:
        """Return the input norms ``[i]`` and the lower Cholesky factor of the damped Gram matrix at unit norms."""
        norm = self.gram.diagonal().sqrt() + NORM_FLOOR
        return norm, torch.linalg.cholesky(linalg.damp(self.gram / torch.outer(norm, norm), DRIFT_DAMPING))

    def shares_inputs(self, other: LayerStats) -> bool:
        """Return whether both are statistics of the same input, and so share the Gram matrix and its factors."""
        return self._factors is other._factors

    def mark_last_use(self) -> None:
        """Mark the next solve as the last use of the Gram matrix."""
        self._last_use = True

    def inverse_cholesky(self, damping: float, take_gram: bool = False) -> Tensor:
        """Return the upper ``U`` with ``UᵀU = (gram + damping * mean(diag) I)⁻¹``; cached for layers that share it.

        Args:
            damping: fraction of the mean diagonal.
            take_gram: whether the caller does not read the Gram matrix afterwards; if no other reader remains, the
                factor overwrites it to save memory.
        """
        take = take_gram and self._last_use
        return self._once(("inverse_cholesky", damping), lambda: linalg.inverse_cholesky(self._own_gram(take), damping))

    def _own_gram(self, take: bool) -> Tensor:
        gram = self.gram
        if not take:
            return gram.clone()
        self._sum_sq, self._gram = gram.diagonal().clone(), None
        return gram

    def normalised(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return the input norms ``[i]`` and the damped Gram matrix at unit norms ``[i, i]``, computed once."""
        norm = self.gram.diagonal().sqrt() + NORM_FLOOR
        return norm, self._once(("normalised", damping), lambda: linalg.normalise(self.gram, norm, damping))

    def _once(self, key: tuple[str, float], compute: Callable[[], Factor]) -> Factor:
        if key not in self._factors:
            self._factors[key] = compute()
        return self._factors[key]


def _rows(inputs: Tensor) -> Tensor:
    """Return inputs ``[..., i]`` as ``[t, i]`` in float32 or better."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()
