"""Measure a model: perplexity, fidelity to the dense model, zero-shot accuracy, speed."""
