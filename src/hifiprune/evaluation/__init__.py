"""Measuring a model: perplexity, fidelity to the dense model it was made from, and zero-shot accuracy."""

from hifiprune.evaluation.fidelity import measure
from hifiprune.evaluation.intervals import Estimate, bootstrap_mean
from hifiprune.evaluation.tasks import check_tasks, zero_shot

__all__ = ["Estimate", "bootstrap_mean", "check_tasks", "measure", "zero_shot"]
