"""Atomic writes, safetensors streaming, hashing, resuming, processes and text sources."""
