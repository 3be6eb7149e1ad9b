"""Layer 5: commands in addition to those of Lightning's Trainer, one function each."""
