"""Text summary of a report: the method, the verdict, and a line for each figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from lit_prune.reporting.report import Calibration, PruningReport, TaskScores


def method(report: PruningReport) -> str:
    """Return a short description of the plan's methods, such as ``Wanda + SparseGPT, AlphaPruning``."""
    plan = report.identity["plan"]
    named = [plan[part]["class_path"] for part in ("scorer", "solver") if plan[part] is not None]
    how = [" + ".join(name for name in named if name != "Zero")]
    how += [plan["allocator"]["class_path"]] if plan["allocator"]["class_path"] != "Uniform" else []
    how += [f"correction {plan['correction']}"] if plan["correction"] else []
    beta = plan.get("residual_correction")  # reports of older versions have neither
    how += [f"residual correction {beta}"] if beta else []
    how += ["two passes"] if plan.get("sequential") is False else []
    how += [f"{report.bits} bits"] if report.bits else []
    return ", ".join([*how, *(["reconstruction"] if report.reconstructions else [])])


def pattern(report: PruningReport) -> str:
    """Return a short description of the plan's pattern, such as ``2:4`` or ``unstructured, by row``."""
    found = report.identity["plan"]["pattern"]
    arguments = found["init_args"]
    if found["class_path"] == "NM":
        return f"{arguments.get('keep')}:{arguments.get('of')}"
    if found["class_path"] == "Structured":
        return f"structured: {', '.join(arguments.get('units', ()))}"
    group = f", by {arguments['group']}" if arguments.get("group") else ""
    return f"{found['class_path'].lower()}{group}"


def verdict(report: PruningReport) -> dict[str, str]:
    """Return the main figures of a pruning, by name."""
    found = {"method": method(report), "pattern": pattern(report), "sparsity of the targets": f"{report.sparsity:.2%}"}
    if (whole := sparsity_of_model(report)) is not None:
        found["sparsity of the whole model"] = f"{whole:.2%}"
    if "perplexity_before" in report.evaluation:
        before, after = report.evaluation["perplexity_before"], report.evaluation["perplexity_after"]
        change = f" ({after / before - 1:+,.0%})" if 0 < before < math.inf and after < math.inf else ""
        found["perplexity"] = f"{before:,.2f} → {after:,.2f}{change}"
    if report.size:
        name, after = ("size", _size_after(report)) if report.kept else ("size as bitmask", report.size.bitmask_bytes)
        change = f" ({after / report.size.bytes - 1:+.0%})"
        found[name] = f"{number_of_bytes(report.size.bytes)} → {number_of_bytes(after)}{change}"
    if report.calibration:
        found["calibration"] = _calibration(report.calibration)
    found["minutes"] = f"{sum(report.seconds.values()) / 60:.1f}"
    if report.date:
        found["date"] = report.date
    return found


def summary(report: PruningReport) -> list[tuple[str, str]]:
    """Return the name and the value of each figure of a report."""
    lines = [
        ("method", f"{method(report)}; {pattern(report)}"),
        ("sparsity of the targeted weights", f"{report.sparsity:.4%} of {len(report.layers)} layers"),
    ]
    if (whole := sparsity_of_model(report)) is not None and report.size:
        lines.append(("sparsity of the whole model", f"{whole:.4%} of {report.size.parameters:,} parameters"))
        dense, bitmask = number_of_bytes(report.size.bytes), number_of_bytes(report.size.bitmask_bytes)
        sizes = f"{dense} dense, {bitmask} as bitmask"
        if report.kept:
            sizes = f"{dense} before, {number_of_bytes(_size_after(report))} after"
        lines.append(("size of the parameters", sizes))
    lines += [(name, f"{before} before, {after} after") for name, before, after in evaluation_rows(report)]
    lines += [(f"{name} (median)", f"{value:.2%}") for name, value in report.diagnostics.items()]
    if report.reconstructions:
        before, after = (fmean(getattr(done, when) for done in report.reconstructions) for when in ("before", "after"))
        lines.append(("mean block error before and after reconstruction", f"{before:.4f}, {after:.4f}"))
    if report.calibration:
        lines.append(("calibration", _calibration(report.calibration)))
    lines += [(f"{stage} seconds", f"{seconds:.1f}") for stage, seconds in report.seconds.items()]
    lines += [("read from the cache", name) for name in report.cached]
    if report.peak_memory is not None:
        lines.append(("peak memory", f"{report.peak_memory / 2**30:.2f} GiB"))
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return lines


def evaluation_rows(report: PruningReport) -> list[tuple[str, str, str]]:
    """Return the name of each figure of the evaluation, and its values before and after pruning."""
    rows = []
    if "perplexity_before" in report.evaluation:
        text = f"perplexity, {report.evaluation['text']}, windows of {report.evaluation['seqlen']} tokens"
        before, after = report.evaluation["perplexity_before"], report.evaluation["perplexity_after"]
        rows.append((text, f"{before:.2f}", f"{after:.2f}"))
    tasks = report.evaluation.get("tasks", TaskScores(before={}, after={}))
    scores = scores_of({"before": tasks["before"], "after": tasks["after"]})
    return [*rows, *((f"{task}, {metric}", before, after) for task, metric, (before, after) in scores)]


def sparsity_of_model(report: PruningReport) -> float | None:
    """Return the fraction of all parameters of the model that were removed; None if its size is unknown."""
    if report.size is None:
        return None
    return sum(layer.reached * layer.numel for layer in report.layers) / report.size.parameters


def _size_after(report: PruningReport) -> float:
    """Return the size in bytes of the smaller model that a structured pattern leaves."""
    return report.size.bytes * (1 - (sparsity_of_model(report) or 0.0)) if report.size else 0.0


def scores_of(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[tuple[str, str, list[str]]]:
    """Return every task and metric with its scores as text, one per column."""
    found = []
    for task, metrics in next(iter(columns.values()), {}).items():
        for metric in (name for name in metrics if not name.endswith("_stderr")):
            values = [
                f"{_score(scores, task, metric):.4f} ± {_score(scores, task, f'{metric}_stderr'):.4f}"
                for scores in columns.values()
            ]
            found.append((task, metric, values))
    return found


def _score(scores: Mapping[str, Mapping[str, float]], task: str, metric: str) -> float:
    return scores.get(task, {}).get(metric, math.nan)


def _calibration(found: Calibration) -> str:
    length, rest = divmod(found.tokens, found.sequences)
    amount = f"{found.sequences:,} x {length:,} tokens" if not rest else f"{found.tokens:,} tokens"
    return f"{amount} of {found.text}" if found.text else amount


def number_of_bytes(count: float) -> str:
    """Format a number of bytes in the largest unit in which it is at least 1, such as ``538 MB``."""
    power = max(0, min(3, int(math.log10(count)) // 3))
    value = count / 1000**power
    return f"{value:.{0 if value >= 100 or not power else 1}f} {('bytes', 'kB', 'MB', 'GB')[power]}"
