"""Layer 2: everything on disk: atomic folders, masks, safe loading of checkpoints, PEFT."""
