"""The options of every command, each written down once: flags, files, run.json and Python calls derive from them."""

from hifiprune.config.bench import BenchConfig
from hifiprune.config.evaluate import EvaluateConfig, Tasks
from hifiprune.config.export import ExportConfig
from hifiprune.config.generate import GenerateConfig
from hifiprune.config.groups import AllocationConfig, Budget, ComputeConfig, CriterionOptions
from hifiprune.config.prune import PruneConfig, ScoreConfig, TableConfig
from hifiprune.config.recover import RecoverConfig, TrainingConfig
from hifiprune.config.study import AblateConfig, CompareConfig
from hifiprune.config.texts import Calibration, Text

__all__ = [
    "AblateConfig",
    "AllocationConfig",
    "BenchConfig",
    "Budget",
    "Calibration",
    "CompareConfig",
    "ComputeConfig",
    "CriterionOptions",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "PruneConfig",
    "RecoverConfig",
    "ScoreConfig",
    "TableConfig",
    "Tasks",
    "Text",
    "TrainingConfig",
]
