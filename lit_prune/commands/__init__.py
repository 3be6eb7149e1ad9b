"""Layer 5: the commands that Lightning's Trainer does not have, one function each."""

from lit_prune.commands.analyze import analyze
from lit_prune.commands.evaluate import evaluate
from lit_prune.commands.export import export
from lit_prune.commands.prune import prune
from lit_prune.commands.speed import speed

__all__ = ["analyze", "evaluate", "export", "prune", "speed"]
