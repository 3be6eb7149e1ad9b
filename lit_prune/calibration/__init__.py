"""Layer 2: run calibration batches through a model block by block, and collect statistics and gradients."""
