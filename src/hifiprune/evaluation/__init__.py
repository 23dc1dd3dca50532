"""Measuring a model: perplexity, fidelity to the dense model it was made from, and zero-shot accuracy."""

from hifiprune.evaluation.fidelity import Reference, estimate, measure, measure_windows
from hifiprune.evaluation.intervals import Estimate, bootstrap_mean, bootstrap_paired
from hifiprune.evaluation.tasks import Tasks, check_tasks, zero_shot

__all__ = [
    "Estimate",
    "Reference",
    "Tasks",
    "bootstrap_mean",
    "bootstrap_paired",
    "check_tasks",
    "estimate",
    "measure",
    "measure_windows",
    "zero_shot",
]
