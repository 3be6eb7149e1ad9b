"""Samples of four tokens: no test reads a random model's forty."""

from lit_prune.models.generate import continuations

continuations.__defaults__ = (4,)
