"""Layer 3: the pruning plan, the pruning engine, the schedule and the report."""

from lit_prune.pruning.plan import PruningPlan
from lit_prune.pruning.quantization import Quantize
from lit_prune.pruning.reconstruction import Reconstruction
from lit_prune.pruning.run import prune
from lit_prune.pruning.schedule import Cubic, Linear, OneShot, Schedule, Step, Table
from lit_prune.reporting.report import PruningReport

__all__ = [
    "Cubic",
    "Linear",
    "OneShot",
    "PruningPlan",
    "PruningReport",
    "Quantize",
    "Reconstruction",
    "Schedule",
    "Step",
    "Table",
    "prune",
]
