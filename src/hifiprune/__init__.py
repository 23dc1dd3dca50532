"""hifiprune: structured pruning of large language models that keeps their predictions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hifiprune.allocation import Budget, allocate
    from hifiprune.calibration import Calibration, load_windows
    from hifiprune.compute import Compute
    from hifiprune.criteria import CRITERIA, Criterion
    from hifiprune.errors import HifipruneError, RunError, UserError
    from hifiprune.evaluation import Estimate, measure
    from hifiprune.inspection import inspect
    from hifiprune.neurons import Mlp, find_mlps
    from hifiprune.pipeline import evaluate, prune, score_checkpoint
    from hifiprune.plan import Plan
    from hifiprune.record import RunRecord
    from hifiprune.scores import Scores
    from hifiprune.scoring import score
    from hifiprune.surgery import cut_

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "Budget",
    "Calibration",
    "Compute",
    "Criterion",
    "Estimate",
    "HifipruneError",
    "Mlp",
    "Plan",
    "RunError",
    "RunRecord",
    "Scores",
    "UserError",
    "allocate",
    "cut_",
    "evaluate",
    "find_mlps",
    "inspect",
    "load_windows",
    "measure",
    "prune",
    "score",
    "score_checkpoint",
]

_HOMES = {
    "Budget": "allocation",
    "CRITERIA": "criteria",
    "Calibration": "calibration",
    "Compute": "compute",
    "Criterion": "criteria",
    "Estimate": "evaluation",
    "HifipruneError": "errors",
    "Mlp": "neurons",
    "Plan": "plan",
    "RunError": "errors",
    "RunRecord": "record",
    "Scores": "scores",
    "UserError": "errors",
    "allocate": "allocation",
    "cut_": "surgery",
    "evaluate": "pipeline",
    "find_mlps": "neurons",
    "inspect": "inspection",
    "load_windows": "calibration",
    "measure": "evaluation",
    "prune": "pipeline",
    "score": "scoring",
    "score_checkpoint": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch takes seconds, `hifiprune --help` should not."""
    if name in _HOMES:
        return getattr(import_module(f"hifiprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hifiprune' has no attribute '{name}'")
