"""Outputs of commands, read again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hifiprune.errors import UserError
from hifiprune.formatting import short
from hifiprune.io.json_files import checked, read_record, read_text
from hifiprune.io.schemas import PASSAGES, Passages, ReportedRun
from hifiprune.models.lineage import pruning_of
from hifiprune.plan import Plan
from hifiprune.scores import Scores

RECORDS = ("run.json", "compare.json")


def read_runs(folders: Sequence[Path]) -> list["Run"]:
    """Runs, each named by as much of the end of its path as tells it from the others.

    Raises:
        UserError: a folder is not one of ours.
    """
    paths, length = [*dict.fromkeys(folder.resolve() for folder in folders)], 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return [Run.read(path, "/".join(path.parts[-length:])) for path in paths]


@dataclass
class Run:
    """The folder of a run.

    Attributes:
        name: by which it is known.
        facts: its record.
        plan: which neurons it kept, if it pruned.
        scores: that decided it.
        passages: read token by token, by model.
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
        """That was run."""
        return str(self.facts["command"])

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """What was found of each model, by the last part of its name where that tells it from the others."""
        found = self.facts["results"]["models"]
        return dict(zip(short(found), found.values(), strict=True))

    @property
    def made(self) -> dict[str, Any] | None:
        """The run that pruned the checkpoint in the folder, if one is there."""
        return pruning_of(self.facts) if self.command in ("prune", "recover") else None

    @property
    def measured_on(self) -> str:
        """Of an evaluation, the text."""
        results = self.facts["results"]
        source = Path(self.facts["arguments"]["text"]).name
        return f"{results['windows']} windows of {results['positions']} tokens of {source}"
