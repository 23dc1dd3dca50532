"""Measuring a model: perplexity, fidelity to the dense model it was made from, and zero-shot accuracy."""

from hifiprune.evaluation.bootstrap import Estimate, bootstrap_mean, bootstrap_paired
from hifiprune.evaluation.fidelity import Reference, estimate, measure, measure_windows
from hifiprune.evaluation.zero_shot_tasks import Answers, Exam, Tasks, average, differences, zero_shot

__all__ = [
    "Answers",
    "Estimate",
    "Exam",
    "Reference",
    "Tasks",
    "average",
    "bootstrap_mean",
    "bootstrap_paired",
    "differences",
    "estimate",
    "measure",
    "measure_windows",
    "zero_shot",
]
