"""Score, solve and write the layers of one block; several processes share the work out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lit_prune.models.targets import Target
from lit_prune.ops import LayerStats, PackedMask, Pattern, collectives
from lit_prune.ops.linalg import relative_output_error
from lit_prune.pruning.plan import PruningPlan
from lit_prune.reporting.report import LayerReport
from lit_prune.sharding.parameters import read_weight, to_parameter_layout, write_weight


def prune_layers(
    targets: Sequence[Target],
    patterns: Mapping[str, Pattern],
    stats: dict[str, LayerStats],
    plan: PruningPlan,
    within: Mapping[str, PackedMask],
    before: Sequence[LayerReport] = (),
    read_again: bool = False,
) -> list[LayerReport]:
    """Prune the layers of one block, and return what was done to them; every process has all the results.

    Args:
        targets: the layers, resident.
        patterns: what each gets, by name.
        stats: of the layers' inputs, by name; the same in every process. Emptied on the way, to give memory back.
        plan: how.
        within: keep masks by parameter name that may not be exceeded.
        before: the layers of the block before this one.
        read_again: whether the statistics are needed after this.
    """
    owners = _owners(targets, stats, plan, before)
    found: dict[str, LayerReport] = {}
    failed: Exception | None = None
    for target in targets:
        mine = stats.pop(target.name)
        needed = read_again or plan.output_error or any(map(mine.shares_inputs, stats.values()))
        if plan.solver.takes_gram and not needed:
            mine.give_to_last_reader()
        if owners[target.name] == collectives.rank() and failed is None:
            try:
                found[target.name] = _prune_layer(
                    target, patterns[target.name], mine, plan, within.get(target.parameter)
                )
            except Exception as error:  # which the others would wait for
                failed = error
    collectives.raise_first(collectives.gather(failed))
    everybody = {name: report for reports in collectives.gather(found) for name, report in reports.items()}
    for target in targets:
        collectives.broadcast(target.module.get_parameter("weight").data, owners[target.name])
    return [everybody[target.name] for target in targets]


def _owners(
    targets: Sequence[Target], stats: Mapping[str, LayerStats], plan: PruningPlan, before: Sequence[LayerReport]
) -> dict[str, int]:
    """Return the process that solves each layer, by name; layers that share a factorisation stay together.

    Costs are the seconds that the block before took, where it is of the same shape: work of many small operations takes
    longer than its floating-point operations say.
    """
    groups: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        groups.setdefault(id(stats[target.name]) if plan.solver.needs else index, []).append(index)
    if [layer.shape for layer in before] == [target.shape for target in targets]:
        costs = [sum(before[index].seconds for index in group) for group in groups.values()]
    else:
        costs = [_flops([targets[index] for index in group], plan) for group in groups.values()]
    owners = zip(groups.values(), collectives.partition(costs), strict=True)
    return {targets[index].name: owner for group, owner in owners for index in group}


def _flops(group: Sequence[Target], plan: PruningPlan) -> float:
    solver = plan.solver
    return solver.shared_flops(group[0].shape[1]) + sum(solver.flops(*target.shape) for target in group)


def _prune_layer(
    target: Target, pattern: Pattern, stats: LayerStats, plan: PruningPlan, within: PackedMask | None
) -> LayerReport:
    start = time.perf_counter()
    weight = stats.make_up_for_drift(read_weight(target.module), plan.correction)
    allowed = to_parameter_layout(target.module, within.unpack().to(weight.device)) if within else None
    solution = plan.solve(target.name, weight, stats, pattern, allowed)
    output_error = relative_output_error(weight, solution.weight, stats.gram) if plan.output_error else None
    write_weight(target.module, solution.weight)
    return LayerReport(
        name=target.name,
        block=target.block,
        shape=target.shape,
        asked=pattern.sparsity,
        reached=1 - solution.keep.sum().item() / solution.keep.numel(),
        output_error=output_error,
        seconds=time.perf_counter() - start,
        mask=PackedMask.pack(to_parameter_layout(target.module, solution.keep)).to("cpu"),
    )
