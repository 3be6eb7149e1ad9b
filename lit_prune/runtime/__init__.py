"""Layer 2: run sparse layers, and measure them."""
