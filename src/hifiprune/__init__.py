"""hifiprune: structured pruning of large language models that keeps their predictions.

Functions whose first argument is a loaded model or `Scores` work in memory: `score`, `allocate`, `cut_`,
`cut_and_repair_`, `measure`; a trailing underscore marks those that change the model. Functions whose first argument is
the name of a checkpoint (local folder, hub id or GGUF file) read and write files, and take one config each: `prune` and
`PruneConfig`, `recover` and `RecoverConfig`, `evaluate` and `EvaluateConfig`. What is not listed here is in its module.
"""

from hifiprune.version import __version__ as __version__

TYPE_CHECKING = False  # as in `typing`, which takes a while to import: a Ctrl-C would find nobody listening yet

if TYPE_CHECKING:
    from hifiprune.calibration import load_windows
    from hifiprune.commands.ablate import ablate
    from hifiprune.commands.bench import bench
    from hifiprune.commands.compare import compare
    from hifiprune.commands.evaluate import evaluate
    from hifiprune.commands.export import export
    from hifiprune.commands.inspect import inspect
    from hifiprune.commands.prune import prune
    from hifiprune.commands.push import push
    from hifiprune.commands.recover import recover
    from hifiprune.commands.report import report
    from hifiprune.commands.score import score_checkpoint
    from hifiprune.config.bench import BenchConfig
    from hifiprune.config.evaluate import EvaluateConfig, Tasks
    from hifiprune.config.export import ExportConfig
    from hifiprune.config.groups import AllocationConfig, Budget, Calibration, ComputeConfig, CriterionOptions, Text
    from hifiprune.config.prune import PruneConfig, ScoreConfig
    from hifiprune.config.recover import RecoverConfig, TrainingConfig
    from hifiprune.config.study import AblateConfig, CompareConfig
    from hifiprune.engine.temporary_cut import cut
    from hifiprune.errors import HifipruneError, RunError, UserError
    from hifiprune.evaluation.bootstrap import Estimate
    from hifiprune.evaluation.fidelity import Reference, measure
    from hifiprune.evaluation.zero_shot_tasks import zero_shot
    from hifiprune.models.mlp import Mlp, find_mlps
    from hifiprune.plan import Plan
    from hifiprune.pruning.allocate import allocate
    from hifiprune.pruning.cut import cut_
    from hifiprune.pruning.cut_checkpoint import cut_checkpoint
    from hifiprune.pruning.repair import cut_and_repair_
    from hifiprune.run_record import RunRecord
    from hifiprune.scores import Scores
    from hifiprune.scoring.criteria import CRITERIA, Criterion, register_criterion
    from hifiprune.scoring.score import score, score_all


__all__ = [
    "CRITERIA",
    "AblateConfig",
    "AllocationConfig",
    "BenchConfig",
    "Budget",
    "Calibration",
    "CompareConfig",
    "ComputeConfig",
    "Criterion",
    "CriterionOptions",
    "Estimate",
    "EvaluateConfig",
    "ExportConfig",
    "HifipruneError",
    "Mlp",
    "Plan",
    "PruneConfig",
    "RecoverConfig",
    "Reference",
    "RunError",
    "RunRecord",
    "ScoreConfig",
    "Scores",
    "Tasks",
    "Text",
    "TrainingConfig",
    "UserError",
    "ablate",
    "allocate",
    "bench",
    "compare",
    "cut",
    "cut_",
    "cut_and_repair_",
    "cut_checkpoint",
    "evaluate",
    "export",
    "find_mlps",
    "held_windows",
    "inspect",
    "load_windows",
    "measure",
    "prune",
    "push",
    "recover",
    "register_criterion",
    "report",
    "score",
    "score_all",
    "score_checkpoint",
    "zero_shot",
]

_HOMES = {
    "CompareConfig": "config.study",
    "EvaluateConfig": "config.evaluate",
    "BenchConfig": "config.bench",
    "AblateConfig": "config.study",
    "Budget": "config.groups",
    "CRITERIA": "scoring.criteria",
    "Calibration": "config.groups",
    "ComputeConfig": "config.groups",
    "Criterion": "scoring.criteria",
    "Estimate": "evaluation.bootstrap",
    "ExportConfig": "config.export",
    "HifipruneError": "errors",
    "Mlp": "models.mlp",
    "CriterionOptions": "config.groups",
    "Plan": "plan",
    "PruneConfig": "config.prune",
    "ScoreConfig": "config.prune",
    "RecoverConfig": "config.recover",
    "Reference": "evaluation.fidelity",
    "RunError": "errors",
    "RunRecord": "run_record",
    "Scores": "scores",
    "AllocationConfig": "config.groups",
    "Tasks": "config.evaluate",
    "Text": "config.groups",
    "TrainingConfig": "config.recover",
    "UserError": "errors",
    "ablate": "commands.ablate",
    "allocate": "pruning.allocate",
    "bench": "commands.bench",
    "compare": "commands.compare",
    "cut": "engine.temporary_cut",
    "cut_": "pruning.cut",
    "cut_checkpoint": "pruning.cut_checkpoint",
    "cut_and_repair_": "pruning.repair",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "find_mlps": "models.mlp",
    "held_windows": "evaluation.text",
    "inspect": "commands.inspect",
    "load_windows": "calibration",
    "measure": "evaluation.fidelity",
    "prune": "commands.prune",
    "push": "commands.push",
    "recover": "commands.recover",
    "register_criterion": "scoring.criteria",
    "report": "commands.report",
    "score": "scoring.score",
    "score_all": "scoring.score",
    "score_checkpoint": "commands.score",
    "zero_shot": "evaluation.zero_shot_tasks",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: torch takes seconds, `hifiprune --help` should not."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"hifiprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hifiprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
