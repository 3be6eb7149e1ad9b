"""Layer 2: weights under a training strategy; storage of blocks in memory, in shards or on disk."""
