"""Layer 2: files on disk: atomic writes, masks, safe loading of checkpoints, PEFT."""
