"""Block-wise reconstruction: train the kept weights of a pruned block to match the dense block's outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from lit_prune.calibration.replay import BlockReplay
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block
from lit_prune.models.targets import Target, find_vectors
from lit_prune.ops import collectives
from lit_prune.ops.linalg import relative_token_errors
from lit_prune.ops.precision import working
from lit_prune.reporting.report import LayerReport, ReconstructionReport


@final
@dataclass(frozen=True)
class Reconstruction:
    """Trains the kept weights of each block after it has been pruned, before the next block is calibrated.

    The loss is ``mean_t ||f(x_t) - d_t||² / ||d_t||²``: ``f(x)`` is the pruned block's output on the hidden states of
    the model as pruned so far, and ``d`` the dense block's output on the hidden states of the dense model, so that a
    block also compensates for the input drift from earlier blocks. The error is relative per token, because a few
    tokens have activations so large that they would dominate an absolute loss. The optimizer is Adam in float32 with a
    one-cycle learning rate; pruned weights have no gradient and stay exactly zero. If training does not reduce a
    block's error on the whole calibration set, the block keeps the weights from the solver.

    Costs ``steps`` forward and backward passes over ``sequences`` sequences per block, and one forward pass of the
    dense model.

    .. code-block:: yaml

        reconstruction: {class_path: Reconstruction, init_args: {steps: 80, rate: 0.08}}
    """

    steps: int = 80
    """Number of Adam steps per block."""
    rate: float = 0.08
    """Peak learning rate, reached after three tenths of the steps, as a fraction of the root mean square of the block's
    kept weights (which differs tenfold between models) times the block's relative error before training (the root of
    the
    loss), which avoids overfitting blocks that lost little."""
    sequences: int = 2
    """Maximum number of calibration sequences per training step, and per batch of every other pass through a block."""
    norms_and_biases: bool = True
    """Also train the block's norms and its layers' biases."""

    def __post_init__(self) -> None:
        """Validate the arguments."""
        for name, value in (("steps", self.steps), ("sequences", self.sequences)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"reconstruction {name} is {value!r}: it must be a whole number, 1 or more")
        rate = self.rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise InputError(f"reconstruction rate is {rate!r}: it must be a number above 0, such as 0.08")
        if not isinstance(self.norms_and_biases, bool):
            raise InputError(f"reconstruction norms_and_biases is {self.norms_and_biases!r}: it must be true or false")

    @torch.no_grad()
    def run(
        self,
        model: nn.Module,
        block: Block,
        targets: Sequence[Target],
        layers: Sequence[LayerReport],
        replay: BlockReplay,
        outputs: Sequence[Tensor],
    ) -> ReconstructionReport:
        """Train a pruned block, and keep the result if it reduces the block's error.

        Args:
            model: model that contains the block.
            block: pruned block to train.
            targets: pruned layers of the block.
            layers: reports of those layers, with their keep masks.
            replay: replay positioned before the block, with the hidden states of the pruned model.
            outputs: outputs of the dense block in the dense model, ``[sequences, t, hidden]`` for every batch.
        """
        start = time.perf_counter()
        vectors = find_vectors(model, block, targets) if self.norms_and_biases else {}
        local = len(block.name) + 1  # parameter names are relative to the block
        parameters = {t.parameter[local:]: t.module.get_parameter("weight") for t in targets}
        parameters |= {name[local:]: parameter for name, parameter in vectors.items()}
        device = next(block.module.parameters()).device
        keep = {layer.parameter[local:]: layer.mask.unpack().to(device) for layer in layers}
        before = after = replay.output_error(block.index, outputs)
        trained = self._train(block.index, parameters, keep, replay, outputs, self.rate * before**0.5)
        for value in trained.values():
            collectives.broadcast(value, 0)  # reductions may differ between processes in the last bit
        error = replay.output_error(block.index, outputs, trained)
        if error < before:  # also false if training has diverged to NaN
            after = error
            for name, value in trained.items():
                parameters[name].copy_(value)
        return ReconstructionReport(block.index, before, after, time.perf_counter() - start, list(vectors))

    def _train(
        self,
        block: int,
        parameters: Mapping[str, Tensor],
        keep: Mapping[str, Tensor],
        replay: BlockReplay,
        outputs: Sequence[Tensor],
        relative_rate: float,
    ) -> dict[str, Tensor]:
        """Return the trained parameters by name within the block, in the original dtypes; the block is not modified."""
        # Half precision would round steps this small away, so a float32 copy is trained.
        masters = {name: working(parameter).clone().requires_grad_() for name, parameter in parameters.items()}
        # Errors and their gradients are so small that Adam's default eps would dominate them.
        optimizer = Adam(masters.values(), eps=1e-12)
        rate = relative_rate * _root_mean_square([masters[name][mask] for name, mask in keep.items()])
        schedule = OneCycleLR(optimizer, rate, total_steps=self.steps + 1, cycle_momentum=False)
        tokens = collectives.all_reduce(torch.tensor([output.shape[:-1].numel() for output in outputs])).tolist()
        for batch in _shuffled(len(outputs), self.steps, seed=block):
            if len(outputs[batch]):
                with torch.enable_grad():
                    output = replay.run(block, batch, _like(parameters, masters))
                    loss = relative_token_errors(output, outputs[batch].to(output)).sum() / tokens[batch]
                loss.backward(inputs=list(masters.values()))
            _add_up_gradients(list(masters.values()))
            for name, mask in keep.items():
                gradient = masters[name].grad
                if gradient is not None:  # an expert to which no token of this batch is routed has none
                    gradient.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return _like(parameters, masters)


def _add_up_gradients(masters: Sequence[Tensor]) -> None:
    """All-reduce the gradients by summation; a gradient stays None if it is None on every process."""
    if collectives.world_size() == 1:
        return
    somewhere = [any(found) for found in zip(*collectives.gather([m.grad is not None for m in masters]), strict=True)]
    for master, has_gradient in zip(masters, somewhere, strict=True):
        if has_gradient:
            master.grad = collectives.all_reduce(torch.zeros_like(master) if master.grad is None else master.grad)


def _like(parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the master weights cast to the dtypes of the parameters."""
    return {name: master.to(parameters[name].dtype) for name, master in masters.items()}


def _root_mean_square(parts: Sequence[Tensor]) -> float:
    """Return the root mean square over all values of all parts."""
    total = sum(part.square().sum(dtype=torch.float64).item() for part in parts)
    return (total / max(1, sum(part.numel() for part in parts))) ** 0.5


def _shuffled(count: int, steps: int, seed: int) -> Iterator[int]:
    """Yield ``steps`` indices below ``count`` in random order, each once before any repeats."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, steps, count):
        yield from torch.randperm(count, generator=generator).tolist()[: steps - start]
