"""hifiprune: structured pruning of large language models that keeps their predictions."""

TYPE_CHECKING = False  # as in `typing`, which takes a while to import: a Ctrl-C would find nobody listening yet

if TYPE_CHECKING:
    from hifiprune.ablation import ablate
    from hifiprune.allocation import Budget, Sharing, allocate
    from hifiprune.calibration import Calibration, load_windows
    from hifiprune.comparison import compare
    from hifiprune.compute import Compute
    from hifiprune.criteria import CRITERIA, Criterion, Options
    from hifiprune.cutting import cut_checkpoint
    from hifiprune.errors import HifipruneError, RunError, UserError
    from hifiprune.evaluation import Estimate, Reference, Tasks, measure, zero_shot
    from hifiprune.exporting import export
    from hifiprune.inspection import inspect
    from hifiprune.measurement import evaluate
    from hifiprune.neurons import Mlp, find_mlps
    from hifiprune.pipeline import prune, score_checkpoint
    from hifiprune.plan import Plan
    from hifiprune.publishing import push
    from hifiprune.record import RunRecord
    from hifiprune.recovery import recover
    from hifiprune.repair import cut_and_repair_
    from hifiprune.reporting import report
    from hifiprune.scores import Scores
    from hifiprune.scoring import score, score_all
    from hifiprune.surgery import cut, cut_
    from hifiprune.texts import Text
    from hifiprune.timing import bench
    from hifiprune.training import Training

__version__ = "0.1.0"
DEFAULT_CRITERION = "entropy-square"
"""How neurons are scored unless another criterion is asked for: first at 20% in `benchmarks/criteria.py`."""

__all__ = [
    "CRITERIA",
    "Budget",
    "Calibration",
    "Compute",
    "Criterion",
    "Estimate",
    "HifipruneError",
    "Mlp",
    "Options",
    "Plan",
    "Reference",
    "RunError",
    "RunRecord",
    "Scores",
    "Sharing",
    "Tasks",
    "Text",
    "Training",
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
    "inspect",
    "load_windows",
    "measure",
    "prune",
    "push",
    "recover",
    "report",
    "score",
    "score_all",
    "score_checkpoint",
    "zero_shot",
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
    "Options": "criteria",
    "Plan": "plan",
    "Reference": "evaluation",
    "RunError": "errors",
    "RunRecord": "record",
    "Scores": "scores",
    "Sharing": "allocation",
    "Tasks": "evaluation",
    "Text": "texts",
    "Training": "training",
    "UserError": "errors",
    "ablate": "ablation",
    "allocate": "allocation",
    "bench": "timing",
    "compare": "comparison",
    "cut": "surgery",
    "cut_": "surgery",
    "cut_checkpoint": "cutting",
    "cut_and_repair_": "repair",
    "evaluate": "measurement",
    "export": "exporting",
    "find_mlps": "neurons",
    "inspect": "inspection",
    "load_windows": "calibration",
    "measure": "evaluation",
    "prune": "pipeline",
    "push": "publishing",
    "recover": "recovery",
    "report": "reporting",
    "score": "scoring",
    "score_all": "scoring",
    "score_checkpoint": "pipeline",
    "zero_shot": "evaluation",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: torch takes seconds, `hifiprune --help` should not."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"hifiprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hifiprune' has no attribute '{name}'")
