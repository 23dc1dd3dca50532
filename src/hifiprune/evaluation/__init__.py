"""Measuring a model: perplexity, and fidelity to the dense model it was made from."""

from hifiprune.evaluation.fidelity import Reference, estimate, measure, measure_windows
from hifiprune.evaluation.intervals import Estimate, bootstrap_mean, bootstrap_paired

__all__ = ["Estimate", "Reference", "bootstrap_mean", "bootstrap_paired", "estimate", "measure", "measure_windows"]
