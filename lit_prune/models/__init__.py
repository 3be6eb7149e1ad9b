"""Layer 2: transformers models: loading, decoder blocks, target layers, experts and adapters."""
