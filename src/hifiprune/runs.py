"""Outputs of commands, read again."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hifiprune.errors import UserError
from hifiprune.lineage import pruning_of
from hifiprune.measurement import PASSAGES
from hifiprune.plan import Plan
from hifiprune.scores import Scores


@dataclass
class Run:
    """The folder of a run.

    Attributes:
        name: the folder's.
        path: where it is.
        facts: its `run.json`.
        plan: which neurons it kept, if it pruned.
        scores: that decided it.
        passages: read token by token, by model.
    """

    name: str
    path: Path
    facts: dict[str, Any]
    plan: Plan | None = None
    scores: Scores | None = None
    passages: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read what is there.

        Raises:
            UserError: the folder is not one of ours.
        """
        try:
            facts = json.loads((folder / "run.json").read_text())
            command = facts["command"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} has no run.json of hifiprune; give outputs of its commands") from error
        found = cls(folder.name, folder, facts)
        if command == "prune":
            found.plan = Plan.load(folder / "hifiprune" / "plan.json")
            found.scores = Scores.load(folder / "hifiprune" / "scores.safetensors")
        if (folder / PASSAGES).is_file():
            found.passages = json.loads((folder / PASSAGES).read_text())
        return found

    @property
    def command(self) -> str:
        """That was run."""
        return str(self.facts["command"])

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Of an evaluation, what was found by the last part of each model's name."""
        return {Path(name).name: row for name, row in self.facts["results"]["models"].items()}

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
