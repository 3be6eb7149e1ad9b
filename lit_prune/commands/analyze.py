"""Estimate from its spectrum how prunable each layer is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import Progress

from lit_prune.allocators import AlphaPruning
from lit_prune.callbacks import Prune
from lit_prune.checkpoint.files import as_json
from lit_prune.checkpoint.outputs import ANALYSIS, check_output
from lit_prune.checkpoint.save import save_documents
from lit_prune.commands.output import show
from lit_prune.errors import InputError
from lit_prune.ops import Unstructured
from lit_prune.ops.masks import check_sparsity
from lit_prune.options import as_list
from lit_prune.pruning import PruningPlan
from lit_prune.reporting import analysis as spectra
from lit_prune.reporting.figures import analysis_figures, as_png
from lit_prune.scorers import Magnitude
from lit_prune.training import LitCausalLM, TextDataModule

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer


def analyze(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    output: str = "analysis",
    overwrite: bool = False,
    sparsities: Sequence[float] | float = (0.5, 0.6, 0.7, 0.8),
    histograms: Sequence[str] | str = (),
) -> None:
    """Reports the prunability of each layer from its weight spectrum; changes nothing.

    The metric and its mapping are taken from the AlphaPruning allocator of the Prune callback, if there is one.

    Args:
        trainer: Trainer, optionally with a Prune callback.
        model: The language model.
        datamodule: Not used.
        output: Folder to write analysis.json and plots to.
        overwrite: Replace the folder if it exists.
        sparsities: Target sparsities to compute allocations for, in [0, 1).
        histograms: Shell patterns over layer names: layers whose spectra to plot with the fitted tail; empty = the
            layers of the first block.
    """
    sparsities, histograms = as_list(sparsities), as_list(histograms)
    if not sparsities:
        raise InputError("sparsities are empty: give at least one, such as [0.5]")
    for sparsity in sparsities:
        check_sparsity(sparsity, "sparsities")
    check_output(output, overwrite, ANALYSIS, reads=[model.pretrained])
    model.configure_model()
    prunes = [callback for callback in trainer.callbacks if isinstance(callback, Prune)]  # type: ignore[attr-defined]
    plan = prunes[0].plan if prunes else PruningPlan(Unstructured(0.5), Magnitude())
    allocator = plan.allocator if isinstance(plan.allocator, AlphaPruning) else AlphaPruning()
    targets = plan.find_targets(model.model)[1]
    shown = histograms or [target.name for target in targets if target.block == targets[0].block]
    with Progress(disable=trainer.quiet) as bar:
        task = bar.add_task("analyzing", total=len(targets))
        advance = partial(bar.update, task)
        analysis = spectra.analyze(
            model.model, targets, allocator, sparsities, shown, lambda done: advance(completed=done)
        )
    figures = analysis_figures(analysis)
    documents: dict[str, str | bytes] = {"analysis.json": as_json(analysis.as_dict())}
    documents |= {f"{name}.png": as_png(figure) for name, figure in figures.items()}
    folder = save_documents(output, documents, overwrite)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, figure in figures.items():
                logger.experiment.add_figure(f"analysis/{name}", figure)
    show(trainer, [analysis.table()], folder)
