"""Measuring a model: perplexity, and fidelity to the dense model it was made from."""

from hifiprune.evaluation.fidelity import measure
from hifiprune.evaluation.intervals import Estimate, bootstrap_mean

__all__ = ["Estimate", "bootstrap_mean", "measure"]
