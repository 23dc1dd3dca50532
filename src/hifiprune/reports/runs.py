"""Read the outputs of commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hifiprune.errors import UserError
from hifiprune.formatting import short_names
from hifiprune.io.json_files import checked, read_record, read_text
from hifiprune.io.schemas import PASSAGES, Passages, ReportedRun
from hifiprune.models.lineage import pruning_of
from hifiprune.plan import Plan
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


@dataclass
class Run:
    """The output folder of a run.

    Attributes:
        name: unique name.
        facts: its record.
        plan: its plan, if it pruned.
        scores: scores that the plan was made from.
        passages: token-by-token comparisons, by model.
    """

    name: str
    facts: dict[str, Any]
    plan: Plan | None = None
    scores: Scores | None = None
    passages: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, name: str) -> "Run":
        """Read what is there.

        Raises:
            UserError: the folder is not one of ours.
        """
        record = next((path for each in RECORDS if (path := folder / each).is_file()), folder / RECORDS[0])
        if not record.is_file() or '"command"' not in (text := read_text(record)):
            raise UserError(f"{folder} has no {record.name} of hifiprune; give outputs of its commands")
        found = cls(name, checked(text, ReportedRun, str(record)))
        if found.command == "prune":
            found.plan = Plan.load(folder / "hifiprune" / "plan.json")
            found.scores = Scores.load(folder / "hifiprune" / "scores.safetensors")
        if (folder / PASSAGES).is_file():
            found.passages = read_record(folder / PASSAGES, Passages)
        return found

    @property
    def command(self) -> str:
        """Return the name of the command."""
        return str(self.facts["command"])

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Return the results of each model, by the last part of its name if that is unique."""
        found = self.facts["results"]["models"]
        return dict(zip(short_names(found), found.values(), strict=True))

    @property
    def made(self) -> dict[str, Any] | None:
        """Return the record of the pruning run of the checkpoint in the folder, if there is one."""
        return pruning_of(self.facts) if self.command in ("prune", "recover") else None

    @property
    def measured_on(self) -> str:
        """Describe the text of an evaluation."""
        results = self.facts["results"]
        text = self.facts["arguments"]["text"]
        source = Path(text["source"] if isinstance(text, dict) else text).name  # plain in records of version 0.1
        return f"{results['windows']} windows of {results['positions']} tokens of {source}"
