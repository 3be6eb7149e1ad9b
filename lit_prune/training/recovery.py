"""What trains when a pruned model recovers: everything, norms and biases, or masked low-rank adapters."""

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
    """What of a model trains. Pruned weights are ``KeepMasks``'s concern, whatever trains."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Freeze what does not train and add what else does, to a model that has just been loaded."""


@final
class Everything(Trainable):
    """Every parameter trains: masked fine-tuning, with ``KeepMasks``.

    .. code-block:: yaml

        model: {trainable: {class_path: Everything}}
    """

    def prepare(self, model: nn.Module) -> None:
        """Leave the model as it is."""


@final
class NormsAndBiases(Trainable):
    """Norms and biases train, the matrices are frozen: the strong and cheap baseline of PERP.

    Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023. Trains every parameter that
    is a vector, well below a thousandth of the model; optimizer moments shrink as much.

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
    """Low-rank adapters that cannot bring a pruned weight back: ``W + M ⊙ (B A) · alpha / rank``.

    Hu et al., "LoRA", 2021, with the keep mask M on the product (MaskLoRA in PERP). ``W`` is frozen. M is what is not
    exactly zero in ``W``, until ``KeepMasks`` hands over its masks. ``Export`` merges the adapters, which changes
    neither masks nor outputs. Saves the optimizer's memory for ``W``; its gradient is still worked out, layer by layer.

    .. code-block:: yaml

        model: {trainable: {class_path: LoRA, init_args: {rank: 16, include: ["*_proj"], norms_and_biases: true}}}

    With ``masked: false`` it is plain LoRA: ``W`` stays sparse, and the adapters, which would fill it if they were
    merged, stay beside it: ``Export`` writes them to the folder ``adapter`` of its output, in PEFT's format, for
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
        """Validate and keep the arguments.

        Args:
            rank: Of the adapters; each adds ``rank (o + i)`` values in float32.
            alpha: The product is scaled by ``alpha / rank``; null = twice the rank.
            include: Shell patterns over module names: linear layers of the decoder blocks that get an adapter.
            exclude: Shell patterns over module names: layers that get none.
            norms_and_biases: Train the norms and biases as well.
            masked: Let adapters change kept weights only, and merge them in the end; false = plain LoRA, never merged.
        """
        if rank < 1:
            raise InputError(f"LoRA.rank is {rank}: it must be at least 1, such as 8")
        if alpha is not None and not 0 < alpha < math.inf:
            raise InputError(f"LoRA.alpha is {alpha}: it must be above 0, such as {2 * rank} for the rank {rank}")
        if not masked and find_spec("peft") is None:
            raise InputError("LoRA.masked is false: plain adapters are saved by PEFT; run pip install lit-prune[peft]")
        self.rank = rank
        self.alpha = 2.0 * rank if alpha is None else alpha
        self.include = as_patterns(include)
        self.exclude = as_patterns(exclude)
        self.norms_and_biases = norms_and_biases
        self.masked = masked

    def prepare(self, model: nn.Module) -> None:
        """Freeze the model and add the adapters; a pattern that matches no layer is an ``InputError``."""
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
    """Freeze every parameter that is not a vector, and return how many are left."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return sum(parameter.requires_grad for parameter in model.parameters())
