"""Layer 3: the plan, the engine, the schedule and the report."""

from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.pruner import prune
from lit_prune.pruning.reconstruction import Reconstruction
from lit_prune.pruning.report import PruningReport
from lit_prune.pruning.schedule import Cubic, Linear, OneShot, Schedule, Step, Table

__all__ = [
    "Cubic",
    "Linear",
    "OneShot",
    "PruningPlan",
    "PruningReport",
    "Reconstruction",
    "Schedule",
    "Step",
    "Table",
    "prune",
]
