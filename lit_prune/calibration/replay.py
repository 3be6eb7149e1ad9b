"""Block-by-block replay of the calibration set, which yields each block's inputs without running the whole model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_prune.calibration.batches import Batch, count_sequences, model_inputs, own_share, split_batch
from lit_prune.calibration.block_inputs import Call, Recorder
from lit_prune.calibration.collector import Collector, expert_layers, inputs_kept
from lit_prune.calibration.suspended import SuspendedPasses
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import Block
from lit_prune.models.experts import Experts
from lit_prune.ops import LayerStats, collectives
from lit_prune.ops.linalg import relative_token_errors
from lit_prune.sharding.block_store import BlockStore, store_of

ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Function that returns a context manager to run the model in, such as autocast."""


class BlockReplay:
    """Runs a model's decoder blocks one at a time over all calibration batches.

    The arguments of each block's call are recorded from the model's own forward pass, which runs once per batch with
    the blocks stubbed out (attention masks and rotary embeddings differ by layer in many models). After that, the
    object holds the inputs of one block at a time, and ``advance`` propagates them through it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        device: torch.device | str | None = None,
        hidden_device: torch.device | str | None = None,
        hidden_dtype: torch.dtype | None = None,
        forward_context: ForwardContext = nullcontext,
        store: BlockStore | None = None,
        share: bool = True,
    ) -> None:
        """Record the arguments of the model's calls of its blocks, and the inputs of the first block.

        Args:
            model: model in evaluation mode.
            blocks: decoder blocks of the model.
            batches: calibration batches, equal in every process.
            device: device that runs the blocks; None = the device of the model.
            hidden_device: device that stores hidden states between blocks; None = the device that runs the blocks.
            hidden_dtype: storage dtype of hidden states between blocks; None = the dtype of the blocks' outputs.
            forward_context: context manager entered around every forward pass, such as autocast.
            store: store of the blocks; None = the model itself.
            share: shard every batch over the processes; False = every process runs all of it.
        """
        if not batches:
            raise InputError("there are no calibration batches: this method needs data")
        self._blocks = blocks
        around = next(model.parameters()).device
        self._device = torch.device(device) if device is not None else around
        self._hidden_device = torch.device(hidden_device) if hidden_device is not None else self._device
        self._hidden_dtype = hidden_dtype
        self._dtype: torch.dtype | None = None
        self._forward_context = forward_context
        self._calls: list[list[Call]] = [[] for _ in blocks]
        self._hidden: list[Tensor] = []
        self.position = 0
        """Index of the block whose inputs the hidden states are."""
        recorder = Recorder(model, blocks, store or store_of(model))
        mine = own_share(batches) if share else batches
        with forward_context():
            if not any(map(count_sequences, mine)):  # to take part in the collectives that determine what blocks return
                recorder.record(model_inputs(split_batch(batches[0], 1)[0], around))
            for batch in mine:
                self._record(recorder, model_inputs(batch, around))

    def _record(self, recorder: Recorder, inputs: dict[str, Tensor]) -> None:
        if count_sequences(inputs):
            hidden, recorded = recorder.record(inputs)
            self._dtype = hidden.dtype
        else:  # all sequences are on other processes
            hidden, recorded = torch.zeros(0, 0, 0), [Call() for _ in self._blocks]
        for calls, call in zip(self._calls, recorded, strict=True):
            calls.append(call)
        self._hidden.append(self._waiting(hidden))

    @torch.no_grad()
    def collect(
        self,
        index: int,
        layers: Mapping[str, nn.Module],
        needs: frozenset[str],
        dense: BlockReplay | None = None,
        advance: bool = False,
    ) -> dict[str, LayerStats]:
        """Run block ``index`` once and return the input statistics of its ``layers``, from all processes.

        Layers that are called with the same tensor object share one ``LayerStats``.

        Args:
            index: index of a block that is not pruned yet.
            layers: layers of the block, by name.
            needs: statistics to collect.
            dense: replay positioned before the same block with the dense model's hidden states, for ``drift``; it is
                advanced past the block.
            advance: also advance this replay past the unpruned block, in the same pass.

        Raises:
            InputError: if a layer is never called, so that it has no statistics.
            NumericalError: if activations are NaN or infinite.
        """
        experts = expert_layers(self._blocks[index].module)
        # The experts that are called, and the last of them, differ between batches.
        collector = Collector(needs, whole_passes=advance or bool(experts))
        of_experts = {id(layer) for group in experts for layer in group}
        # The dense model routes other tokens to an expert, so its inputs cannot be compared.
        compared = {name: layer for name, layer in layers.items() if id(layer) not in of_experts}
        for batch in range(len(self._hidden)):
            collector.sequences = len(self._hidden[batch])
            if dense is not None:
                with inputs_kept(compared, collector.dense_inputs):
                    dense._hidden[batch] = dense._waiting(dense.run(index, batch))
            with collector.watching(layers):
                output = self.run(index, batch)
                if advance:
                    self._hidden[batch] = self._waiting(output)
        stats = collector.from_all_processes(layers, compared if dense is not None else {})
        for name in layers:
            if name not in stats:
                raise InputError(f"{name} was never called on the calibration set: exclude it with plan.exclude")
            stats[name].check_finite(name)
        for moved in [replay for replay in (dense, self if advance else None) if replay is not None]:
            moved._check_finite(index)
            moved.position = index + 1
        return stats | self.pooled(index, layers, stats)

    @torch.no_grad()
    def sharing(self, index: int, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """Return the names of the layers of block ``index``, grouped by shared input, from one pass through it."""
        collector = Collector(frozenset())
        for batch in range(len(self._hidden)):
            with collector.watching(layers):
                self.run(index, batch)
        return collector.sharing()

    def pooled(
        self, index: int, layers: Mapping[str, nn.Module], stats: Mapping[str, LayerStats]
    ) -> dict[str, LayerStats]:
        """Return the pooled statistics of all experts, for experts that received too few tokens.

        Too few means fewer than a Gram matrix has rows. The inputs of an expert's last layer are its own hidden units,
        which are unrelated to those of other experts: they are pooled only if the expert received no token.
        """
        found: dict[str, LayerStats] = {}
        for group in expert_layers(self._blocks[index].module):
            mine = [name for name, layer in layers.items() if any(layer is other for other in group)]
            least = (
                group[0].in_features if mine and mine[0].endswith("up_proj") and "gram" in stats[mine[0]].needs else 1
            )
            scarce = [name for name in mine if stats[name].tokens < least]
            if scarce:
                warnings.warn(
                    f"{len(scarce)} of {len(mine)} experts saw fewer than {least} calibration tokens, "
                    f"{scarce[0]} {stats[scarce[0]].tokens}: they are pruned with the statistics of all, pooled",
                    stacklevel=2,
                )
                found |= dict.fromkeys(scarce, LayerStats.pooled([stats[name] for name in mine]))
        return found

    @property
    def hidden(self) -> Sequence[Tensor]:
        """Current hidden states ``[sequences, t, hidden]`` of every batch: the outputs of the previous block."""
        return self._hidden

    def fork(self) -> BlockReplay:
        """Return an independent replay at the same position."""
        twin = copy.copy(self)
        twin._hidden, twin._calls = list(self._hidden), list(self._calls)
        return twin

    def replaced(self, index: int, module: nn.Module) -> BlockReplay:
        """Return an independent replay in which another module takes the place of block ``index``."""
        twin = self.fork()
        twin._blocks = [Block(b.index, b.name, module) if b.index == index else b for b in self._blocks]
        return twin

    @torch.no_grad()
    def outputs(self, index: int) -> list[Tensor]:
        """Return the outputs ``[sequences, t, hidden]`` of block ``index`` on every batch."""
        return [self._waiting(self.run(index, batch)) for batch in range(len(self._hidden))]

    @torch.no_grad()
    def output_error(
        self, index: int, outputs: Sequence[Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> float:
        """Return the error of block ``index`` relative to given ``outputs``: ``mean_t ||change_t||² / ||output_t||²``.

        Args:
            index: index of the block.
            outputs: reference outputs ``[sequences, t, hidden]`` for every batch, such as those of the dense block.
            parameters: as for ``run``.
        """
        return _mean_error(
            (self.run(index, batch, parameters), dense.to(self._device)) for batch, dense in enumerate(outputs)
        )

    @torch.no_grad()
    def error_without(self, outputs: Sequence[Tensor]) -> float:
        """Return the error of the current hidden states relative to a block's ``outputs``, as if it were left out."""
        return _mean_error(zip(self._hidden, outputs, strict=True))

    @torch.no_grad()
    def advance(self, index: int, outputs: Sequence[Tensor] | None = None) -> None:
        """Replace the hidden states by the outputs of block ``index``, or by given ``outputs`` of it."""
        for batch in range(len(self._hidden)):
            self._hidden[batch] = self._waiting(self.run(index, batch) if outputs is None else outputs[batch])
        self._check_finite(index)
        self.position = index + 1
        self._calls[index] = []  # its masks and embeddings are no longer needed

    def _check_finite(self, index: int) -> None:
        """Raise ``NumericalError`` on every rank if a block's outputs are not finite on any rank."""
        bad = [batch for batch, hidden in enumerate(self._hidden) if not _is_finite(hidden)]
        for found in collectives.gather(bad):
            if found:
                name = self._blocks[index].name
                stored = f" in {self._hidden_dtype}, plan.hidden_dtype" if self._hidden_dtype else ""
                raise NumericalError(f"the output of {name} holds NaN or Inf on calibration batch {found[0]}{stored}")

    def _waiting(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._hidden_device, self._hidden_dtype)

    def run(self, index: int, batch: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output ``[sequences, t, hidden]`` of block ``index`` on one batch.

        Args:
            index: index of the block whose inputs are the current hidden states.
            batch: index of the batch.
            parameters: replacements for parameters of the block, by name within it; gradients flow to them if enabled.
        """
        with self._forward_context():
            return self._forward(index, batch, parameters)

    def _forward(self, index: int, batch: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        hidden = self._hidden[batch].to(self._device, self._dtype)
        if not len(hidden):
            return hidden
        call = self._calls[index][batch].to(self._device)
        output = functional_call(self._blocks[index].module, dict(parameters or {}), (hidden, *call.args), call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def suspended(
        self,
        index: int,
        layers: Mapping[str, nn.Module],
        writers: Mapping[str, nn.Module] | None = None,
        behind_writers: bool = False,
    ) -> SuspendedPasses:
        """Return passes of block ``index`` over all batches that wait at the given layers, by name.

        Args:
            index: index of the block whose inputs are the current hidden states.
            layers: layers to wait at, by name.
            writers: layers whose outputs are added up, by name; see ``SuspendedPasses.written``.
            behind_writers: whether to wait behind the writers, with their outputs, instead of before them.
        """
        experts = [module for module in self._blocks[index].module.modules() if isinstance(module, Experts)]

        def run(batch: int) -> Tensor:
            return self._waiting(self._forward(index, batch))

        context = self._forward_context
        return SuspendedPasses(run, len(self._hidden), layers, experts, context, writers, behind_writers)


def _mean_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean of the relative errors of all tokens of all processes, of outputs and references by batch."""
    total = torch.zeros(2, dtype=torch.float64)  # the sum and the number of the errors
    for output, reference in pairs:
        errors = relative_token_errors(output, reference)
        total += torch.tensor([errors.sum(dtype=torch.float64).item(), errors.numel()])
    error, tokens = collectives.all_reduce(total).tolist()
    return error / tokens


def _is_finite(hidden: Tensor) -> bool:
    """Return whether all values are finite, from their extremes, so that no mask is allocated."""
    return not hidden.numel() or all(extreme.isfinite() for extreme in hidden.aminmax())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Disable dropout and compiled code within the context, and restore the mode of every module on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not run hooks that are added later
            yield
    finally:
        for module in training:
            module.training = True
