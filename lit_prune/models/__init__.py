"""Layer 2: the parts of a transformers model: blocks, targets, experts and adapters; loading it."""
