"""State, optimizer, sharding, checkpoints, logging, the loop and its two steps."""
