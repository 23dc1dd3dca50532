"""Serve a checkpoint: GGUF files and inference engines."""
