"""Score, solve and write the layers of one block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lit_prune.models.coupling import Coupling
from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, PackedMask, Pattern, collectives
from lit_prune.ops.linalg import relative_output_error
from lit_prune.ops.masks import keep_only
from lit_prune.pruning.plan import PruningPlan
from lit_prune.reporting.report import LayerReport
from lit_prune.sharding.parameters import read_weight, to_parameter_layout, write_weight


@dataclass(frozen=True)
class LayerSolver:
    """Prunes layers according to a plan; the ranks divide the layers of a block."""

    plan: PruningPlan
    patterns: Mapping[str, Pattern]
    """Pattern of every layer, by layer name."""
    allowed: Mapping[str, PackedMask]
    """Keep masks by parameter name; only weights that they keep may be kept."""
    couplings: Mapping[str, Coupling] = field(default_factory=dict)
    """Units of every layer that reads some, by layer name; empty unless the pattern is structured."""

    def prune(
        self,
        targets: Sequence[Target],
        stats: dict[str, LayerStats],
        before: Sequence[LayerReport] = (),
        read_again: bool = False,
    ) -> list[LayerReport]:
        """Prune the layers of one block; every rank receives all results.

        Args:
            targets: layers to prune, resident in memory.
            stats: statistics of the layers' inputs by layer name, equal on every rank; emptied during the call to free
                memory.
            before: reports of the previous block's layers.
            read_again: whether the statistics are needed after this call.
        """
        owners = self._owners(targets, stats, before)
        found: dict[str, LayerReport] = {}
        failed: Exception | None = None
        for target in targets:
            mine = stats.pop(target.name)
            needed = (
                read_again
                or self.plan.output_error
                or self.plan.quantize
                or any(map(mine.shares_inputs, stats.values()))
            )
            if self.plan.solver.takes_gram and not needed:
                mine.mark_last_use()
            if owners[target.name] == collectives.rank() and failed is None:
                try:
                    found[target.name] = self._prune_layer(target, mine)
                except Exception as error:  # re-raised on every rank below, so that none hangs
                    failed = error
        collectives.raise_first(collectives.gather(failed))
        everybody = {name: report for reports in collectives.gather(found) for name, report in reports.items()}
        for target in targets:
            collectives.broadcast(target.module.get_parameter("weight").data, owners[target.name])
        reports = []
        for target in targets:
            coupling, report = self.couplings.get(target.name), everybody[target.name]
            reports += _with_producers(report, coupling) if coupling else [report]
        return reports

    def _owners(
        self, targets: Sequence[Target], stats: Mapping[str, LayerStats], before: Sequence[LayerReport]
    ) -> dict[str, int]:
        """Return the rank that solves each layer, by name; layers that share a factorisation get the same rank.

        The cost of a layer is its duration in the previous block if that has the same shapes, because many small
        operations take longer than their floating-point operations suggest.
        """
        groups: dict[int, list[int]] = {}
        for index, target in enumerate(targets):
            groups.setdefault(id(stats[target.name]) if self.plan.solver.needs else index, []).append(index)
        if [layer.shape for layer in before] == [target.shape for target in targets]:
            costs = [sum(before[index].seconds for index in group) for group in groups.values()]
        else:
            costs = [self._flops([targets[index] for index in group]) for group in groups.values()]
        owners = zip(groups.values(), collectives.partition(costs), strict=True)
        return {targets[index].name: owner for group, owner in owners for index in group}

    def _flops(self, group: Sequence[Target]) -> float:
        return self.plan.solver.shared_flops(group[0].shape[1]) + sum(self.plan.flops(*t.shape) for t in group)

    def _prune_layer(self, target: Target, stats: LayerStats) -> LayerReport:
        start = time.perf_counter()
        pattern, allowed = self.patterns[target.name], self.allowed.get(target.parameter)
        plan = self.plan
        weight = stats.correct_drift(read_weight(target.module), plan.correction)
        limit = to_parameter_layout(target.module, allowed.unpack().to(weight.device)) if allowed else None
        solution = plan.solve(target.name, weight, stats, pattern, limit)
        diagnostics = plan.scorer.diagnose(weight, stats, pattern) if plan.scorer else {}
        error = relative_output_error(weight, solution.weight, stats.gram) if plan.output_error else None
        write_weight(target.module, solution.weight)
        return LayerReport(
            name=target.name,
            block=target.block,
            shape=target.shape,
            asked=pattern.sparsity,
            reached=1 - solution.keep.sum().item() / solution.keep.numel(),
            output_error=error,
            seconds=time.perf_counter() - start,
            mask=PackedMask.pack(to_parameter_layout(target.module, solution.keep)).to("cpu"),
            diagnostics=diagnostics,
        )


def _with_producers(report: LayerReport, coupling: Coupling) -> list[LayerReport]:
    """Zero the rows of the units that a layer reads no longer; return its report and those of the rows' layers."""
    columns = to_parameter_layout(coupling.consumer.module, report.mask.unpack())[0]
    kept = coupling.keep(columns[coupling.columns[:, 0]])
    of_consumer = kept[report.name].columns
    assert of_consumer is not None
    reports = [replace(report, kept_columns=of_consumer.tolist())]
    for target in (producer.target for producer in coupling.producers):
        rows = kept[target.name].rows
        assert rows is not None
        keep = kept[target.name].mask(target.shape)
        weight = read_weight(target.module)
        write_weight(target.module, keep_only(weight, keep.to(weight.device)))
        reports.append(
            LayerReport(
                name=target.name,
                block=target.block,
                shape=target.shape,
                asked=report.asked,
                reached=1 - len(rows) / target.shape[0],
                output_error=None,
                seconds=0.0,
                mask=PackedMask.pack(to_parameter_layout(target.module, keep)),
                kept_rows=rows.tolist(),
            )
        )
    return reports
