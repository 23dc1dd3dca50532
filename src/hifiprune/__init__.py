"""hifiprune: structured pruning of large language models that keeps their predictions.

Functions whose first argument is a loaded model or `Scores` work in memory: `score`, `allocate`, `cut_`,
`cut_and_repair_`, `measure`; a trailing underscore marks those that change the model. Functions whose first argument is
the name of a checkpoint (local folder, hub id or GGUF file) read and write files, and take the config of their name:
`prune` and `PruneConfig`, `recover` and `RecoverConfig`, `evaluate` and `EvaluateConfig`. Groups of options that one
command takes are in `hifiprune.config`, and all else in its module.
"""

from hifiprune.version import __version__ as __version__

_MODULES = {
    # functions on checkpoints, and their configs
    "prune": "commands.prune",
    "score_checkpoint": "commands.score",
    "table_checkpoint": "commands.width_table",
    "recover": "commands.recover",
    "evaluate": "commands.evaluate",
    "compare": "commands.compare",
    "ablate": "commands.ablate",
    "bench": "commands.bench",
    "export": "commands.export",
    "inspect": "commands.inspect",
    "generate": "commands.generate",
    "report": "commands.report",
    "push": "commands.push",
    "PruneConfig": "config",
    "ScoreConfig": "config",
    "TableConfig": "config",
    "RecoverConfig": "config",
    "EvaluateConfig": "config",
    "CompareConfig": "config",
    "AblateConfig": "config",
    "BenchConfig": "config",
    "ExportConfig": "config",
    "GenerateConfig": "config",
    # options that most of them take
    "Budget": "config",
    "Calibration": "config",
    "ComputeConfig": "config",
    "Text": "config",
    # functions on models
    "load_windows": "calibration",
    "held_windows": "evaluation.text",
    "score": "scoring.score",
    "allocate": "pruning.allocate",
    "cut_": "pruning.cut",
    "cut_and_repair_": "pruning.repair",
    "measure": "evaluation.fidelity",
    # what they hand to each other, errors, extensions
    "Scores": "scores",
    "Plan": "plan",
    "RunRecord": "run_record",
    "UserError": "errors",
    "RunError": "errors",
    "register_criterion": "scoring.criteria",
}
"""The public names, with their modules; `__init__.pyi` says the same to type checkers."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: torch takes seconds, `hifiprune --help` should not."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"hifiprune.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'hifiprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
