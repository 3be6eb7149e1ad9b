"""Layer 2: what must know torch modules and transformers."""
