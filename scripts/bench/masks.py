"""Measure the cost of keeping masks: seconds per training step, with and without masks in turn, and memory at rest.

The model is pruned at the start and then trained, and gradients are masked in every other optimizer step. The medians
of both kinds of steps, which run under the same conditions, are compared. If the step times vary by more than the cost
of the masks, the separate timing of masking the same gradients is more accurate.

    python scripts/bench/masks.py --model out/smollm2-135m
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prune.callbacks import KeepMasks, Prune
from lit_prune.malloc import keep_freed_memory
from lit_prune.ops import PackedMask, Unstructured
from lit_prune.ops.masks import keep_only
from lit_prune.pruning import PruningPlan
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, TextDataModule

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}
"""Clocks to use; the second measures only this process, for machines with other load."""


class Alternate(Callback):
    """Disables the masks in every other step and times both kinds of steps."""

    def __init__(self, keeper: KeepMasks) -> None:
        """Store the callback to measure."""
        self.keeper = keeper
        self.masks = keeper.masks
        self.steps: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        self._start: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Switch the masks on or off, and start the clocks."""
        self.masks = self.keeper.masks or self.masks
        self.keeper.take(trainer, pl_module, self.masks if trainer.global_step % 2 else {})
        self._start = {name: clock() for name, clock in CLOCKS.items()}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop the clocks."""
        self.steps[bool(self.keeper.masks)].append(
            {name: CLOCKS[name]() - start for name, start in self._start.items()}
        )


def mask_gradients(masks: list[PackedMask], times: int = 5) -> float:
    """Return the median CPU seconds for masking one gradient per mask."""
    seconds = []
    for _ in range(times):
        total = 0.0
        for mask in masks:
            gradient = torch.randn(mask.shape)
            start = time.process_time()
            keep_only(gradient, mask.unpack())
            total += time.process_time() - start
        seconds.append(total)
    return statistics.median(seconds)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=8, help="steps of each kind, after one to warm up")
    options = parser.parse_args()
    keep_freed_memory()
    keeper = KeepMasks()
    alternate = Alternate(keeper)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2 * options.pairs + 2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Prune(PruningPlan(Unstructured(0.5), Magnitude(), output_error=False)), keeper, alternate],
    )
    data = TextDataModule(options.model, dataset="embedded", seqlen=options.seqlen, batch_size=options.batch_size)
    trainer.fit(LitCausalLM(options.model, dtype="float32"), data)
    for clock in CLOCKS:
        kept, free = ([step[clock] for step in alternate.steps[kind][1:]] for kind in (True, False))
        ratios = [a / b for a, b in zip(kept, free, strict=True)]
        with_masks, without, ratio = (statistics.median(values) for values in (kept, free, ratios))
        print(f"{clock} seconds per step: {with_masks:.2f} with masks, {without:.2f} without")
        print(f"  ratio {ratio:.3f}, the median of {len(ratios)} pairs: {min(ratios):.3f} to {max(ratios):.3f}")
    masks = list(alternate.masks.values())
    seconds = mask_gradients(masks)
    print(f"masking alone: {seconds:.3f} s of {without:.2f} CPU seconds per step, {seconds / without:.1%}")
    weights = sum(torch.Size(mask.shape).numel() for mask in masks)
    at_rest = sum(mask.bits.numel() for mask in masks) / weights
    print(f"memory at rest: {at_rest:.4f} bytes for each of {weights:,} targeted weights")


if __name__ == "__main__":
    main()
