"""Layer 4: Lightning callbacks, with hooks and state but no maths."""

from lit_prune.callbacks.export import Export
from lit_prune.callbacks.find_learning_rate import FindLearningRate
from lit_prune.callbacks.keep_masks import KeepMasks
from lit_prune.callbacks.prune import Prune
from lit_prune.callbacks.stop_on_divergence import StopOnDivergence
from lit_prune.callbacks.training_progress import TrainingProgress
from lit_prune.callbacks.validate_at_start import ValidateAtStart

__all__ = [
    "Export",
    "FindLearningRate",
    "KeepMasks",
    "Prune",
    "StopOnDivergence",
    "TrainingProgress",
    "ValidateAtStart",
]
