"""Logging of pruning results to TensorBoard and other loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lit_prune.pruning import PruningReport
from lit_prune.reporting.documents import report_figures


def log_pruning(logger: Logger, report: PruningReport, before: PruningReport | None, step: int) -> None:
    """Log the sparsity reached, overall and by block, the change of the masks since the last pruning, and figures.

    Args:
        logger: any Lightning logger; figures are logged to TensorBoard only.
        report: report of this pruning.
        before: report of the previous pruning; None = there was none.
        step: optimizer step.
    """
    numbers = {"prune/sparsity": report.sparsity}
    numbers |= {f"prune_block/sparsity_{block:02d}": value for block, value in report.sparsity_by_block().items()}
    if before is not None:
        numbers["prune/mask_change"] = report.mask_change(before)
    logger.log_metrics(numbers, step=step)
    if isinstance(logger, TensorBoardLogger):
        for name, figure in report_figures(report).items():
            logger.experiment.add_figure(f"prune/{name}", figure, global_step=step)


def log_outcome(logger: Logger, report: PruningReport, metrics: Mapping[str, float]) -> None:
    """Log the plan as hyper-parameters, together with the final metrics."""
    parameters = dict(_flat(report.identity["plan"]))
    if isinstance(logger, TensorBoardLogger):
        # Under the name of a curve, the final value would be added to that curve as another point.
        final = {f"final/{name}": value for name, value in metrics.items()}
        logger.log_hyperparams(parameters, {"final/sparsity": report.sparsity, **final})
    else:
        logger.log_hyperparams(parameters)


def _flat(values: Any, path: str = "plan") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings, with their dotted paths."""
    if not isinstance(values, Mapping):
        return [(path, values if isinstance(values, (int, float, str, bool)) else str(values))]
    return [leaf for key, value in values.items() for leaf in _flat(value, f"{path}.{key}")]
