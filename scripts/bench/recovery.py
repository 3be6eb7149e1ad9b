"""Compare recovery methods for a pruned model within a time budget: test perplexity, tokens, minutes, peak memory.

The model is pruned with the default recipe; the result, with and without additional reconstruction, is kept in the work
folder, and each recovery starts from one of them. Nine tenths of the training text are for training and calibration,
the last tenth for validation. A minute is one minute of two cores, 120 seconds of processor time, so that ``--jobs``
and other load do not affect the budget. Each row runs in a separate process and appends one line to a JSONL file; a row
with an existing line is not run again, so the script can be interrupted and resumed. At the end it prints the table.

    python scripts/bench/recovery.py --model out/smollm2-135m --train valid.txt --test test.txt
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import MIXED, PATTERNS
from rows import Record

from lit_prune.allocators import Measured, Uniform
from lit_prune.callbacks import Export, KeepMasks, StopOnDivergence
from lit_prune.checkpoint.files import read_json, write_atomically
from lit_prune.checkpoint.save import save_pruned
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.pruning.progress import peak_memory
from lit_prune.reporting.documents import render
from lit_prune.solvers import ADMM
from lit_prune.training import LitCausalLM, TextDataModule
from lit_prune.training.losses import Distillation, LanguageModelLoss, Loss
from lit_prune.training.recovery import Everything, LoRA, NormsAndBiases, Trainable
from lit_prune.training.schedules import WarmupCosine

CORE_SECONDS = 120
"""Processor seconds in one minute of two cores."""
STARTS: dict[str, Reconstruction | None] = {
    "one-shot": None,
    "reconstructed": Reconstruction(),
    "reconstructed, 40 steps": Reconstruction(steps=40),
}


@dataclass(frozen=True)
class Recovery:
    """One way to train a pruned model."""

    rate: float
    trainable: Callable[[], Trainable] = Everything
    loss: Callable[[str], Loss] = lambda teacher: LanguageModelLoss()
    start: str = "one-shot"
    minutes: float = 10
    steps: int | None = None
    """Number of steps instead of minutes; more than the steps that ``Budget`` times."""


def distillation(teacher: str) -> Distillation:
    """Return a distillation loss with the default weights."""
    return Distillation(teacher, language_model=0.5, logits=1.0, hidden=1.0, dtype="float32")


RECOVERIES = {
    "norms and biases": Recovery(1e-3, NormsAndBiases),
    "LoRA": Recovery(1e-3, lambda: LoRA(16, norms_and_biases=True)),
    "full": Recovery(2e-4),
    "distilled": Recovery(2e-4, loss=distillation),
    "full, 100 steps": Recovery(2e-4, steps=100),
    "best": Recovery(2e-4, loss=distillation, start="reconstructed", minutes=22),
}
"""Recoveries to compare; with 8 minutes of pruning and reconstruction before it, the best takes half an hour."""
DENSE = "dense"


def names() -> list[str]:
    """Return the names of the rows; starting points come first, so that parallel jobs find them finished."""
    patterns = [pattern for pattern in PATTERNS if pattern != MIXED]
    starts = [f"{pattern} {start}" for start in ("one-shot", "reconstructed") for pattern in patterns]
    starts += ["70% reconstructed, 40 steps"]
    recoveries = [f"70% {name}" for name in RECOVERIES]
    recoveries += [f"{pattern} best" for pattern in patterns if pattern != "70%"]
    recoveries += ["80% distilled", "80% full, 100 steps", f"{DENSE} full, 100 steps"]
    return [DENSE, *starts, *recoveries]


class Budget(Callback):
    """Sets the number of steps to the given one, or so that training takes the given minutes without validation."""

    WARM_UP, LOOK = 2, 10
    """Number of steps before timing starts, and number of timed steps."""

    def __init__(self, minutes: float, steps: int | None = None) -> None:
        """Store the budget."""
        self.seconds = CORE_SECONDS * minutes
        self.steps = steps
        self.spent = 0.0
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Start timing the step."""
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop timing the step; set the number of steps after enough of them have been timed."""
        self.spent += time.process_time() - self._start
        if trainer.global_step == self.WARM_UP:
            self._before = self.spent
        elif trainer.global_step == self.WARM_UP + self.LOOK:
            possible = self.WARM_UP + (self.seconds - self._before) / (self.spent - self._before) * self.LOOK
            every = int(trainer.val_check_interval)
            steps = self.steps or max(round(possible / every), 1) * every  # so that the last step is validated
            trainer.fit_loop.epoch_loop.max_steps = steps
            for config in trainer.lr_scheduler_configs:
                assert isinstance(config.scheduler, WarmupCosine)
                config.scheduler.total = steps


def run(name: str, options: argparse.Namespace) -> Record:
    """Prune, or recover a pruned model, and evaluate."""
    if name == DENSE:
        module = LitCausalLM(options.model, dtype="float32")
        module.configure_model()
        return evaluate(module, options)
    pattern, _, way = name.partition(" ")
    if way in STARTS:
        return prune_one(pattern, way, options)
    return recover(pattern, way, options)


def prune_one(pattern: str, way: str, options: argparse.Namespace) -> Record:
    """Prune with the default recipe, save and evaluate; all starting points of a pattern share one allocation."""
    first = options.work / pattern / "one-shot" / "pruning.json"
    allocation = None if way == "one-shot" else read_json(first)["allocation"]
    module = LitCausalLM(options.model, dtype="float32")
    module.configure_model()
    plan = PruningPlan(
        PATTERNS[pattern],
        allocator=Measured() if isinstance(PATTERNS[pattern], Unstructured) else Uniform(),
        solver=ADMM(),
        correction=0.3,
        reconstruction=STARTS[way],
        output_error=False,
    )
    start = time.process_time()
    report = prune(module.model, text(options).calibration_batches(), plan, allocation=allocation)
    minutes = (time.process_time() - start) / CORE_SECONDS
    folder = options.work / pattern / way
    save_pruned(folder, module.model, module.load_tokenizer(), report.masks, render(report, title=way), True)
    return {"minutes": minutes, "peak_memory": peak_memory(), **evaluate(module, options)}


def recover(pattern: str, way: str, options: argparse.Namespace) -> Record:
    """Train a pruned model, or the dense one as a control, and evaluate its best checkpoint."""
    recovery, recovered = RECOVERIES[way], options.work / pattern / way
    folder = options.model if pattern == DENSE else str(options.work / pattern / recovery.start)
    module = LitCausalLM(
        folder,
        dtype="float32",
        trainable=recovery.trainable(),
        loss=recovery.loss(options.model),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=recovery.rate, weight_decay=0.0, fused=True),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup=10),
    )
    budget = Budget(recovery.minutes / options.hurry, recovery.steps)
    export = Export(str(recovered), overwrite=True, best=True)
    checkpoint = ModelCheckpoint(recovered.with_suffix(".ckpt"), monitor="val/perplexity", save_weights_only=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1_000_000,
        gradient_clip_val=1.0,
        val_check_interval=options.val_every,
        limit_val_batches=16 // options.batch_size,  # 16 windows suffice to select the best checkpoint
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StopOnDivergence(), budget, checkpoint, *([] if pattern == DENSE else [KeepMasks(folder), export])],
    )
    trainer.fit(module, text(options))
    best = module if pattern == DENSE else LitCausalLM(str(recovered), dtype="float32")
    best.configure_model()
    return {
        "steps": trainer.global_step,
        "tokens": trainer.global_step * options.batch_size * options.seqlen,
        "minutes": budget.spent / CORE_SECONDS,
        "peak_memory": peak_memory(),
        "validation": export.validation,
        **evaluate(best, options),
    }


def evaluate(module: LitCausalLM, options: argparse.Namespace) -> Record:
    """Return the perplexities of the test text and of a second text."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    found = {}
    for name, source in (("perplexity", options.test), ("embedded", "embedded")):
        data = TextDataModule(options.model, test=source, seqlen=options.seqlen, max_windows=options.max_windows)
        found[name] = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
    return found


def text(options: argparse.Namespace) -> TextDataModule:
    """Return a data module with the training text, whose last tenth is for validation."""
    lines = options.train.read_text().splitlines(keepends=True)
    train, validation = options.work / "train.txt", options.work / "validation.txt"
    for file, part in ((train, lines[: len(lines) * 9 // 10]), (validation, lines[len(lines) * 9 // 10 :])):
        write_atomically(file, partial(Path.write_text, data="".join(part)))  # other jobs read it too
    return TextDataModule(
        options.model,
        train=str(train),
        val=str(validation),
        calibration=str(train),
        sequences=32,
        seqlen=options.seqlen,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table, by pattern."""
    lines = [
        "| model | perplexity | of dense | of the embedded text | tokens | minutes | peak memory GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = next((record["perplexity"] for record in records if record["name"] == DENSE), float("nan"))
    patterns, order = [DENSE, *PATTERNS], names()
    for record in sorted(records, key=lambda r: (patterns.index(r["name"].split()[0]), order.index(r["name"]))):
        tokens = f"{record['tokens']:,}" if "tokens" in record else ""
        minutes = f"{record['minutes']:.1f}" if "minutes" in record else ""
        memory = f"{record['peak_memory'] / 2**30:.2f}" if "peak_memory" in record else ""
        perplexities = (f"{record['perplexity']:.2f}", f"{record['perplexity'] / dense:.2f}")
        cells = (record["name"], *perplexities, f"{record['embedded']:.2f}", tokens, minutes, memory)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows, then print the table."""
    parser = rows.parser(__doc__, "out/bench/recovery.jsonl")
    parser.add_argument("--train", type=Path, required=True, help=".txt file to calibrate and train on")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--val-every", type=int, default=25, help="steps between validations")
    parser.add_argument("--hurry", type=float, default=1.0, help="divide the minutes by this, to try the script")
    parser.add_argument("--work", type=Path, default=Path("out/bench/recovery"), help="folder for pruned models")
    options = parser.parse_args()
    rows.show(table(rows.measure(names(), lambda name: run(name, options), options)), options.write)


if __name__ == "__main__":
    main()
