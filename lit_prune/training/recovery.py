"""Trainable parameters for recovery: everything, norms and biases, or masked low-rank adapters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import final

from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.lora import adapt
from lit_prune.models.targets import Patterns, as_patterns, find_targets
from lit_prune.ops import PackedMask


class Trainable(ABC):
    """Base class for the choice of trainable parameters; ``KeepMasks`` keeps pruned weights at zero for all of them."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Freeze the other parameters of a newly loaded model, and add new trainable parameters if any."""


@final
class Everything(Trainable):
    """Trains every parameter: masked fine-tuning, together with ``KeepMasks``.

    .. code-block:: yaml

        model: {trainable: {class_path: Everything}}
    """

    def prepare(self, model: nn.Module) -> None:
        """Leave the model unchanged."""


@final
class NormsAndBiases(Trainable):
    """Trains norms and biases with all matrices frozen: the strong and cheap baseline of PERP.

    Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023. Trains every parameter that
    is a vector, well below a thousandth of the model, and reduces the optimizer moments accordingly.

    .. code-block:: yaml

        model: {trainable: {class_path: NormsAndBiases}}
    """

    def prepare(self, model: nn.Module) -> None:
        """Freeze every matrix."""
        vectors = _train_vectors_only(model)
        if not vectors:
            raise InputError(
                f"model.trainable is NormsAndBiases: {type(model).__name__} has neither norms with weights nor biases; "
                "use Everything or LoRA"
            )


@final
class LoRA(Trainable):
    """Trains low-rank adapters that leave pruned weights at zero: ``W + M ⊙ (B A) · alpha / rank``.

    Hu et al., "LoRA", 2021, with the keep mask M applied to the product (MaskLoRA in PERP). ``W`` is frozen. M keeps
    the nonzero entries of ``W``, until ``KeepMasks`` sets its own masks. ``Export`` merges the adapters, which changes
    neither masks nor outputs. Saves the optimizer state of ``W``; its gradient is still computed, layer by layer.

    .. code-block:: yaml

        model: {trainable: {class_path: LoRA, init_args: {rank: 16, include: ["*_proj"], norms_and_biases: true}}}

    ``masked: false`` is plain LoRA: ``W`` stays sparse, and the adapters stay separate, because merging them would make
    ``W`` dense. ``Export`` writes them to the subfolder ``adapter`` of its output, in PEFT's format, for
    ``PeftModel.from_pretrained(model, "OUTPUT/adapter")``.

    .. code-block:: yaml

        model: {trainable: {class_path: LoRA, init_args: {rank: 16, masked: false}}}
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        include: Patterns = ("*",),
        exclude: Patterns = (),
        norms_and_biases: bool = False,
        masked: bool = True,
    ) -> None:
        """Validate and store the arguments.

        Args:
            rank: Rank of the adapters; each adds ``rank (o + i)`` parameters in float32.
            alpha: Numerator of the scale ``alpha / rank`` of the adapters; null = twice the rank.
            include: Shell patterns over module names: which linear layers of the decoder blocks get an adapter.
            exclude: Shell patterns over module names: layers without an adapter, even if ``include`` matches them.
            norms_and_biases: Also train norms and biases.
            masked: Restrict adapters to kept weights and merge them on export; false = plain LoRA, never merged.
        """
        if rank < 1:
            raise InputError(f"LoRA.rank is {rank}: it must be at least 1, such as 8")
        if alpha is not None and not 0 < alpha < math.inf:
            raise InputError(f"LoRA.alpha is {alpha}: it must be above 0, such as {2 * rank} for the rank {rank}")
        if not masked and find_spec("peft") is None:
            raise InputError("LoRA.masked is false: plain adapters are saved by PEFT; run pip install lit-prune[peft]")
        self.rank = rank
        self.alpha = 2.0 * rank if alpha is None else alpha
        if include is None or exclude is None:
            raise InputError("LoRA.include or exclude is null: give shell patterns, such as ['*_proj']")
        self.include = as_patterns(include)
        self.exclude = as_patterns(exclude)
        self.norms_and_biases = norms_and_biases
        self.masked = masked

    def prepare(self, model: nn.Module) -> None:
        """Freeze the model and add the adapters; raise ``InputError`` if a pattern matches no layer."""
        targets = find_targets(model, find_blocks(model), self.include, self.exclude, owner="LoRA")
        experts = [target.name for target in targets if not self.masked and ".experts." in target.name]
        if experts:
            raise InputError(
                f"LoRA.masked is false and {experts[0]} is an expert, whose adapters PEFT cannot put on: add "
                "'*.experts.*' to LoRA.exclude, or make it masked"
            )
        for target in targets:
            if self.rank > min(target.shape):
                raise InputError(
                    f"LoRA.rank is {self.rank}, and {target.name} has the shape {list(target.shape)}: give at most "
                    f"{min(target.shape)}, which is the rank of the matrix itself, or exclude the layer"
                )
        if self.norms_and_biases:
            _train_vectors_only(model)
        else:
            model.requires_grad_(False)
        for target in targets:
            keep = PackedMask.pack(target.module.get_parameter("weight").detach() != 0) if self.masked else None
            adapt(target.module, self.rank, self.alpha / self.rank, keep)


def _train_vectors_only(model: nn.Module) -> int:
    """Freeze every parameter that is not a vector, and return the number of parameter tensors left to train."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return sum(parameter.requires_grad for parameter in model.parameters())
