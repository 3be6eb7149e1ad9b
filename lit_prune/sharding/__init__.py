"""Layer 2: weights under a training strategy, and storage of blocks in memory, in shards or on disk."""
