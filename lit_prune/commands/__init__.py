"""Layer 5: the commands that Lightning's Trainer does not have, one function each."""
