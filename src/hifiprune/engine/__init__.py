"""Run a model block by block, with its weights in memory or on the disk."""
