"""Layer 2: run calibration batches through a model block by block; collect statistics and gradients."""
