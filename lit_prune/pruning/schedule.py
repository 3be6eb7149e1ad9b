"""Pruning schedules: the sparsity at each optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from lit_prune.errors import InputError
from lit_prune.ops.masks import check_sparsity


class Schedule(ABC):
    """Maps optimizer steps (not batches) to sparsities."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Return whether the model is pruned after ``step`` optimizer steps (0 = before the first)."""

    @abstractmethod
    def sparsity(self, step: int, final: float) -> float:
        """Return the sparsity at a step that is due; at the last step, exactly ``final``, the plan's own."""

    @property
    @abstractmethod
    def last(self) -> int:
        """Step of the last pruning."""


@final
@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once, to the plan's sparsity.

    .. code-block:: yaml

        schedule: {class_path: OneShot, init_args: {step: 0}}
    """

    step: int = 0
    """Optimizer step after which to prune; 0 = before the first."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _check_step("step", self.step)

    def due(self, step: int) -> bool:
        """Return whether ``step`` is the step of the pruning."""
        return step == self.step

    def sparsity(self, step: int, final: float) -> float:
        """Return ``final``."""
        return final

    @property
    def last(self) -> int:
        """Step of the pruning."""
        return self.step


@dataclass(frozen=True)
class _Ramp(Schedule):
    """Prunes at ``start``, every ``every`` steps, and at ``end``, to a higher sparsity each time."""

    start: int
    """Optimizer step of the first pruning."""
    end: int
    """Optimizer step of the last pruning, which reaches the plan's sparsity exactly."""
    every: int
    """Number of optimizer steps between two prunings."""
    initial: float = 0.0
    """Sparsity at ``start``."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _check_step("start", self.start)
        _check_step("end", self.end)
        object.__setattr__(self, "initial", check_sparsity(self.initial, "initial"))
        if self.end <= self.start:
            raise InputError(f"schedule end is {self.end}: it must be after start, {self.start}")
        if self.every < 1:
            raise InputError(f"schedule every is {self.every}: it must be at least 1 optimizer step")

    def due(self, step: int) -> bool:
        """Return True at ``start``, every ``every`` steps after it, and at ``end``."""
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.every == 0)

    def sparsity(self, step: int, final: float) -> float:
        """Return the curve's value at ``step``; exactly ``initial`` at ``start`` and ``final`` at ``end``."""
        if final < self.initial:
            raise InputError(f"schedule initial is {self.initial}: it is above the plan's sparsity, {final}")
        return final + (self.initial - final) * self._left(1 - (step - self.start) / (self.end - self.start))

    @abstractmethod
    def _left(self, time: float) -> float:
        """Return the remaining fraction of the sparsity increase, given the remaining fraction of the steps."""

    @property
    def last(self) -> int:
        """Step of the last pruning, ``end``."""
        return self.end


@final
@dataclass(frozen=True)
class Cubic(_Ramp):
    """Cubic ramp, fast at first and slow at the end: ``s_f + (s_i - s_f) (1 - (t - start) / (end - start))³``.

    Zhu & Gupta, "To prune, or not to prune", 2017. Prunes at ``start``, every ``every`` steps, and at ``end``.

    .. code-block:: yaml

        schedule: {class_path: Cubic, init_args: {start: 0, end: 300, every: 50, initial: 0.2}}
    """

    def _left(self, time: float) -> float:
        return time**3


@final
@dataclass(frozen=True)
class Linear(_Ramp):
    """Linear ramp: ``s_f + (s_i - s_f) (1 - (t - start) / (end - start))``.

    Prunes at ``start``, every ``every`` steps, and at ``end``.

    .. code-block:: yaml

        schedule: {class_path: Linear, init_args: {start: 0, end: 300, every: 50, initial: 0.2}}
    """

    def _left(self, time: float) -> float:
        return time


@final
@dataclass(frozen=True)
class Step(Schedule):
    """Equal jumps: ``times`` prunings, ``every`` steps apart, each adding the same fraction of the final sparsity.

    .. code-block:: yaml

        schedule: {class_path: Step, init_args: {start: 0, every: 100, times: 3}}
    """

    every: int
    """Number of optimizer steps between two jumps."""
    times: int
    """Number of jumps; the last reaches the plan's sparsity exactly."""
    start: int = 0
    """Optimizer step of the first jump."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _check_step("start", self.start)
        for name, value in (("every", self.every), ("times", self.times)):
            if value < 1:
                raise InputError(f"schedule {name} is {value}: it must be at least 1")

    def due(self, step: int) -> bool:
        """Return True at ``start`` and at each of the ``times - 1`` jumps after it, ``every`` steps apart."""
        return self.start <= step <= self.last and (step - self.start) % self.every == 0

    def sparsity(self, step: int, final: float) -> float:
        """Return the sparsity after the jump at ``step``."""
        return final * (((step - self.start) // self.every + 1) / self.times)

    @property
    def last(self) -> int:
        """Step of the last jump."""
        return self.start + (self.times - 1) * self.every


@final
@dataclass(frozen=True)
class Table(Schedule):
    """Explicit sparsities at explicit steps.

    .. code-block:: yaml

        schedule: {class_path: Table, init_args: {sparsities: {0: 0.3, 100: 0.5, 300: 0.7}}}
    """

    sparsities: dict[int, float]
    """Sparsity at each optimizer step, as a mapping of step to sparsity; the last must equal the plan's own."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not self.sparsities:
            raise InputError("schedule sparsities is empty: give at least one step, such as {0: 0.5}")
        for step, sparsity in self.sparsities.items():
            check_sparsity(sparsity, f"at step {_check_step('step', step)}, sparsities")
        object.__setattr__(self, "sparsities", dict(sorted(self.sparsities.items())))

    def due(self, step: int) -> bool:
        """Return whether the table has an entry for ``step``."""
        return step in self.sparsities

    def sparsity(self, step: int, final: float) -> float:
        """Return the table's sparsity for ``step``."""
        reached = self.sparsities[self.last]
        if reached != final:
            raise InputError(
                f"schedule sparsities end at {reached}: the plan's pattern asks for {final}; make them equal"
            )
        return self.sparsities[step]

    @property
    def last(self) -> int:
        """Last step of the table."""
        return max(self.sparsities)


def _check_step(name: str, step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"schedule {name} is {step!r}: it must be a whole number of optimizer steps, 0 or more")
    return step
