"""Layer 2: sparse layers for inference, the speed of layers and models, and the plug-in for transformers."""
