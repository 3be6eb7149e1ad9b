"""Layer 2: sparse layers for inference, and their speed."""
