"""The pruning plan: pattern, scorer, allocator and solver as one validated value."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_prune.allocators import Allocator, Uniform
from lit_prune.allocators.base import in_whole_levels, meet_budget
from lit_prune.checkpoint.outputs import check_folder_for
from lit_prune.errors import InputError, NumericalError, first_line
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.targets import Patterns, Target, as_layer, as_patterns, find_targets
from lit_prune.ops import NM, LayerStats, PackedMask, Pattern, Structured
from lit_prune.pruning.quantization import Quantize
from lit_prune.pruning.reconstruction import Reconstruction
from lit_prune.scorers import Scorer
from lit_prune.solvers import Solver, Zero
from lit_prune.solvers.base import Solution

HiddenDtype = Literal["bfloat16", "float16", "float32"]
Propagate = Literal["pruned", "dense"]
_MAX_SCALED = 0.99
"""Highest sparsity of a layer after an allocation is scaled."""


@dataclass(frozen=True)
class PruningPlan:
    """A sparsity pattern with any combination of scorer, allocator and solver.

    .. code-block:: yaml

        plan:
          pattern: {class_path: Unstructured, init_args: {sparsity: 0.5}}
          scorer: {class_path: Wanda}
          allocator: {class_path: Uniform}
          solver: {class_path: Zero}
          exclude: ["*.down_proj"]
    """

    pattern: Pattern
    """Target sparsity and its structure: Unstructured, NM, or Structured for a smaller model."""
    scorer: Scorer | None = None
    """Importance of each weight; may be null if the solver selects the mask itself (SparseGPT)."""
    # None represents the default, because a default object could not be serialized to a saved configuration.
    allocator: Allocator = None  # type: ignore[assignment]
    """Sparsity of each layer; null = Uniform."""
    solver: Solver = None  # type: ignore[assignment]
    """Mask selection and repair of the kept weights; null = Zero, which repairs nothing."""
    correction: float = 0.0
    """Strength of the drift correction, in [0, 1]; 0 = none, as in the papers. Costs one more forward pass of the
    calibration set, and one more matrix product per Gram matrix."""
    reconstruction: Reconstruction | None = None
    """Training of each pruned block to match the outputs of the dense block; null = none."""
    quantize: Quantize | None = None
    """Rounding of the kept weights to 8 or 4 bits, for a packed model; null = none."""
    include: Patterns = ("*",)
    """Shell patterns over module names: which linear layers of the decoder blocks to prune."""
    exclude: Patterns = ()
    """Shell patterns over module names: layers to leave dense, even if ``include`` matches them."""
    cache: str | None = None
    """Folder that caches gradient norms and spectral metrics across runs with the same model; null = no cache."""
    output_error: bool = True
    """Measure each layer's relative output error, which needs its Gram matrix; false makes Magnitude and Wanda
    faster."""
    device: str | None = None
    """Device for calibration and solves, one block at a time, such as cuda for a model in CPU memory; null = the device
    of the model."""
    hidden_device: str | None = None
    """Device that stores the calibration set's hidden states between blocks, such as cpu to save GPU memory; null = the
    device that runs the blocks."""
    hidden_dtype: HiddenDtype | None = None
    """Storage dtype of the calibration set's hidden states between blocks, such as bfloat16 to halve the memory for a
    float32 model; null = the dtype of the blocks' outputs."""
    propagate: Propagate = "pruned"
    """Source of a block's calibration inputs: the ``pruned`` blocks before it, or the ``dense`` blocks, which saves one
    of two forward passes and costs accuracy."""

    sequential: bool | None = None
    """Calibrate each layer behind the pruned layers before it in its own block, in a single pass through the block,
    which holds the block's activations on the whole calibration set. False = calibrate all layers of a block at once,
    before any of them is pruned; then a second pass yields the inputs of the next block. null = true if there is
    memory for it, and ``propagate`` is ``pruned``."""
    residual_correction: float = 0.0
    """Strength of the correction for the drift of the residual stream, in [0, 1], in the layers whose outputs are added
    to it; 0 = none. Needs ``sequential``, and costs as much as ``correction``; both together cost it once."""

    def __post_init__(self) -> None:
        """Fill in the defaults, and raise ``InputError`` if the parts are incompatible."""
        object.__setattr__(self, "allocator", self.allocator or Uniform())
        object.__setattr__(self, "solver", self.solver or Zero())
        object.__setattr__(self, "include", as_patterns(self.include))
        object.__setattr__(self, "exclude", as_patterns(self.exclude))
        self._check_parts()
        self.allocator.check(self.pattern)
        if self.scorer is None and self.solver.needs_score:
            raise InputError(f"plan.solver {type(self.solver).__name__} needs a plan.scorer, such as Wanda")
        for name in ("correction", "residual_correction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"plan.{name} is {getattr(self, name)!r}: it must be in [0, 1], such as 0.3")
        if self.propagate not in get_args(Propagate):
            raise InputError(f"plan.propagate is {self.propagate!r}: it must be 'pruned' or 'dense'")
        if self.propagate == "dense" and self.needs_reference:
            raise InputError(
                "plan.propagate is 'dense': correction and reconstruction compensate for what pruned blocks do to the "
                "inputs of later ones, so they need 'pruned'"
            )
        if self.quantize and self.reconstruction:
            raise InputError(
                "plan.quantize rounds weights to a grid, and plan.reconstruction trains them off it: leave out one"
            )
        if self.quantize and isinstance(self.pattern, Structured):
            raise InputError(
                "plan.quantize is set, and a Structured pattern removes inputs from the groups that share a scale: "
                "quantise the smaller model in a second run, at plan.pattern Unstructured with sparsity 0"
            )
        if self.sequential is not None and not isinstance(self.sequential, bool):
            raise InputError(f"plan.sequential is {self.sequential!r}: it must be true, false or null")
        if self.residual_correction and self.sequential is False:
            raise InputError("plan.residual_correction is for layers behind pruned ones: set plan.sequential to true")
        if self.propagate == "dense" and self.sequential:
            raise InputError("plan.sequential needs the outputs of pruned layers: set plan.propagate to 'pruned'")
        if self.hidden_dtype is not None and self.hidden_dtype not in get_args(HiddenDtype):
            raise InputError(f"plan.hidden_dtype is {self.hidden_dtype!r}: it must be one of {get_args(HiddenDtype)}")

    def _check_parts(self) -> None:
        """Raise ``InputError`` if a part has the wrong type, such as a name or a number."""
        for name, kind, example in (
            ("pattern", Pattern, "Unstructured(0.5)"),
            ("scorer", Scorer, "Wanda()"),
            ("allocator", Allocator, "AlphaPruning()"),
            ("solver", Solver, "SparseGPT()"),
            ("reconstruction", Reconstruction, "Reconstruction()"),
            ("quantize", Quantize, "Quantize(4)"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in ("scorer", "reconstruction", "quantize")):
                raise InputError(
                    f"plan.{name} is {value!r}: it must be a {kind.__name__}, such as {example}; a whole plan is "
                    'PruningPlan(Unstructured(0.5), scorer=Wanda()), and on the command line "--plan wanda"'
                )

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that calibration must collect; empty = no data is needed."""
        needs = self.method_needs | ({"gram"} if self.output_error or self.quantize else set())
        needs |= {"gram", "drift"} if self.correction else set()
        return needs | {"gram", "output_target"} if self.residual_correction else needs

    @property
    def method_needs(self) -> frozenset[str]:
        """Statistics of a layer's inputs that scorer and solver require."""
        return self.solver.needs | (self.scorer.needs if self.scorer else frozenset())

    @property
    def grouped_pattern(self) -> Pattern:
        """The pattern, with the method's default comparison group if the pattern names none."""
        return self.pattern.grouped(self.scorer.group if self.scorer else self.solver.group)

    @property
    def needs_data(self) -> bool:
        """Whether the plan needs a calibration set."""
        return self.needs_replay or bool(self.allocator.needs) or self.removes_blocks

    @property
    def removes_blocks(self) -> bool:
        """Whether whole decoder blocks are removed."""
        return isinstance(self.pattern, Structured) and "blocks" in self.pattern.units

    @property
    def removes_only_blocks(self) -> bool:
        """Whether whole decoder blocks are removed, and nothing else."""
        return self.removes_blocks and len(self.pattern.units) == 1  # type: ignore[attr-defined]

    @property
    def needs_replay(self) -> bool:
        """Whether the calibration set is propagated through the blocks while they are pruned."""
        return bool(self.needs) or self.needs_reference

    @property
    def needs_reference(self) -> bool:
        """Whether the dense model's hidden states are propagated as well."""
        return bool(self.correction or self.residual_correction) or self.reconstruction is not None

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the floating-point operations to solve one layer, without those that layers of one input share."""
        return self.solver.flops(outputs, inputs) + (self.quantize.flops(outputs, inputs) if self.quantize else 0)

    def at(self, sparsity: float) -> PruningPlan:
        """Return a copy of the plan at another sparsity."""
        return replace(self, pattern=self.pattern.at(sparsity))

    def find_targets(self, model: nn.Module) -> tuple[list[Block], list[Target]]:
        """Return the decoder blocks and the layers to prune; raise ``InputError`` if the plan cannot be applied."""
        for name in ("device", "hidden_device"):
            _check_device(f"plan.{name}", getattr(self, name))
        if self.cache:
            check_folder_for("plan.cache", self.cache)
        blocks = find_blocks(model)
        targets = find_targets(model, blocks, self.include, self.exclude)
        for target in targets:
            self.pattern.check(target.shape, target.name)
        return blocks, targets

    def allocate(
        self,
        targets: Sequence[Target],
        evidence: Mapping[int, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return the sparsity of every layer, by layer name.

        Args:
            targets: layers to prune.
            evidence: the allocator's observations, by block index.
            metrics: the allocator's metrics of the weights, by layer name.
        """
        layers = [as_layer(t, (evidence or {}).get(t.block), (metrics or {}).get(t.name)) for t in targets]
        return self.allocator.allocate(layers, self.pattern.sparsity)

    def patterns(
        self,
        targets: Sequence[Target],
        allocation: Mapping[str, float],
        sparsity: float | None = None,
        allowed: Mapping[str, PackedMask] | None = None,
    ) -> dict[str, Pattern]:
        """Return the pattern of every layer, by layer name.

        Args:
            targets: layers to prune.
            allocation: sparsities by layer name, as returned by ``allocate``.
            sparsity: overall sparsity to scale ``allocation`` to; None = the plan's own.
            allowed: keep masks by parameter name; no layer becomes less sparse than its mask.
        """
        pattern, layers = self.grouped_pattern, [as_layer(target) for target in targets]
        if sparsity is not None:
            allocation = meet_budget(layers, allocation, sparsity, 0.0, max(sparsity, _MAX_SCALED))
        if isinstance(pattern, NM):
            goal = pattern.sparsity if sparsity is None else sparsity
            least = {
                target.name: 1 - allowed[target.parameter].unpack().double().mean().item()
                for target in targets
                if allowed and target.parameter in allowed
            }
            allocation = in_whole_levels(layers, allocation, goal, pattern.of, least)
        return {name: pattern.at(value) for name, value in allocation.items()}

    def with_gradients(self, stats: dict[str, LayerStats], gradients: Mapping[str, Tensor]) -> dict[str, LayerStats]:
        """Return the statistics by layer name, with gradient norms ``[o, i]`` added if the scorer needs them."""
        if self.scorer is None or not gradients:
            return stats
        return {n: s.with_gradient({self.scorer.gradient_norm: gradients[n]}) for n, s in stats.items()}

    def solve(
        self, name: str, weight: Tensor, stats: LayerStats, pattern: Pattern, allowed: Tensor | None = None
    ) -> Solution:
        """Score, solve and quantise one layer; raise a ``NumericalError`` that names the layer on failure."""
        try:
            score = self.scorer.score(weight, stats) if self.scorer else None
            solution = self.solver.solve(weight, stats, pattern, score, allowed)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        if self.quantize is None:
            return solution
        return solution._replace(weight=self.quantize.round(*solution, weight, stats.gram))

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain data: class paths and arguments, as in YAML."""
        described = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("pattern", "scorer", "allocator", "solver", "reconstruction", "quantize"):
            described[name] = _described(described[name]) if described[name] is not None else None
        return {**described, "include": list(self.include), "exclude": list(self.exclude)}


def _described(method: Any) -> dict[str, Any]:
    """Return the class path and arguments of a method; the bare class name for a class of this package."""
    cls = type(method)
    values = {name: getattr(method, name) for name in inspect.signature(cls).parameters}
    return {
        "class_path": cls.__name__
        if cls.__module__.startswith("lit_prune.")
        else f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {n: _described(v) if isinstance(v, (Allocator, Scorer, Solver)) else v for n, v in values.items()},
    }


def _check_device(option: str, value: str | None) -> None:
    """Raise ``InputError`` if tensors cannot be allocated on a device."""
    if value is None:
        return
    try:
        device = torch.device(value)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"{option} is {value!r}, which cannot be used here ({first_line(error)}): give cpu, or cuda with a GPU"
        ) from error
