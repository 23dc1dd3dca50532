"""Read the outputs of commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hifiprune.errors import UserError
from hifiprune.io.json_files import checked, read_record, read_text
from hifiprune.models.lineage import pruning_of
from hifiprune.plan import Plan
from hifiprune.records import BenchRun, CompareRun, EvaluateRun, PruneRun, RecoverRun, ReportedRun
from hifiprune.results import PASSAGES, Passages
from hifiprune.scores import Scores

RECORDS = ("run.json", "compare.json")


def read_runs(folders: Sequence[Path]) -> list["Run"]:
    """Read runs, each named by the shortest end of its path that is unique.

    Raises:
        UserError: a folder is not one of ours.
    """
    paths, length = [*dict.fromkeys(folder.resolve() for folder in folders)], 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return [Run.read(path, "/".join(path.parts[-length:])) for path in paths]


@dataclass(frozen=True)
class Run:
    """The output folder of a run.

    Attributes:
        name: unique name.
        text: its record as it stands in the file.
        record: its record.
        plan: its plan, if it pruned.
        scores: scores that the plan was made from.
        passages: token-by-token comparisons, by model.
    """

    name: str
    text: str
    record: PruneRun | RecoverRun | EvaluateRun | BenchRun | CompareRun
    plan: Plan | None = None
    scores: Scores | None = None
    passages: Passages = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, name: str) -> "Run":
        """Read what is there.

        Raises:
            UserError: the folder is not one of ours.
        """
        path = next((path for record in RECORDS if (path := folder / record).is_file()), folder / RECORDS[0])
        if not path.is_file() or '"command"' not in (text := read_text(path)):
            raise UserError(f"{folder} has no {path.name} of hifiprune; give outputs of its commands")
        run = cls(name, text, checked(text, ReportedRun, str(path)))
        if isinstance(run.record, PruneRun):
            details = folder / "hifiprune"
            plan, scores = Plan.load(details / "plan.json"), Scores.load(details / "scores.safetensors")
            run = replace(run, plan=plan, scores=scores)
        if (folder / PASSAGES).is_file():
            run = replace(run, passages=read_record(folder / PASSAGES, Passages))
        return run

    @property
    def made(self) -> PruneRun | None:
        """Return the record of the pruning run of the checkpoint in the folder, if there is one."""
        return pruning_of(self.record)
