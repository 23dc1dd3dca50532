"""`WidthTable`: what every width of every MLP costs, and the widths that cost least within a budget."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.json_files import Count, checked, read_text
from hifiprune.scores import Scores

FORMAT = "hifiprune-widths-1"


class WidthTableFile(TypedDict):
    """The table as its file has it."""

    format: Literal["hifiprune-widths-1"]
    names: Annotated[list[str], Field(min_length=1)]
    widths: list[list[Count]]
    costs: list[list[float]]
    criterion: str
    model_hash: str
    data_hash: str


@dataclass(frozen=True)
class WidthTable:
    """KL divergence from the dense model that narrowing one MLP alone costs, its output projection refitted.

    Attributes:
        names: path of each MLP in the model.
        widths: widths measured for each MLP, ascending; the last is its full width.
        costs: mean KL divergence in nats at each of them; 0 at the full width.
        criterion: name of the criterion whose scores chose the neurons kept.
        model_hash: SHA-256 of the dense weights.
        data_hash: SHA-256 of the calibration windows.
    """

    names: list[str]
    widths: list[list[int]]
    costs: list[list[float]]
    criterion: str
    model_hash: str
    data_hash: str

    def save(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write the table as JSON; only a file that hifiprune wrote is replaced."""
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_text(json.dumps(asdict(self) | {"format": FORMAT}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "WidthTable":
        """Read a table that `save` wrote.

        Raises:
            UserError: the file is missing, holds no table, or was changed.
        """
        if not local_path(path).exists():
            raise UserError(f"table of widths {path} does not exist; make it with 'hifiprune table'")
        text = read_text(local_path(path))
        if f'"{FORMAT}"' not in text:
            raise UserError(f"{path} holds no widths in the format {FORMAT}; make it with 'hifiprune table'")
        facts: WidthTableFile = checked(text, WidthTableFile, str(path))
        arguments: dict[str, Any] = {name: value for name, value in facts.items() if name != "format"}
        table = cls(**arguments)
        for name, widths, costs in zip(table.names, table.widths, table.costs, strict=False):
            if len(widths) != len(costs) or widths != sorted({*widths}) or not np.isfinite(costs).all():
                raise UserError(f"{path} was changed since hifiprune wrote it ({name}); make it with 'hifiprune table'")
        if not len(table.names) == len(table.widths) == len(table.costs):
            raise UserError(f"{path} was changed since hifiprune wrote it; make it with 'hifiprune table'")
        return table

    def require_scores(self, scores: Scores) -> None:
        """Refuse scores of another model or criterion than the table's.

        Raises:
            UserError: they are.
        """
        sizes = [widths[-1] for widths in self.widths]
        same = (self.names, sizes) == (scores.names, [len(values) for values in scores.values])
        if not same or self.model_hash != scores.model_hash:
            raise UserError("this table of widths belongs to another model; make one with 'hifiprune table'")
        if self.criterion != scores.criterion:
            raise UserError(
                f"this table of widths is of neurons chosen by '{self.criterion}', these scores are by "
                f"'{scores.criterion}'; use the scores that it was made from"
            )

    def best_widths(self, width: int, *, round_to: int, floor: float) -> list[int]:
        """Return the widths, with mean `width`, that have the least sum of costs, exactly.

        Costs between measured widths are interpolated linearly, those below are the costs at the least one.

        Args:
            width: mean width.
            round_to: widths are multiples of it, or unchanged; any numbers if `width` is no multiple.
            floor: fraction of the mean width that every MLP keeps.
        """
        step = 1 if width % round_to else round_to
        least = max(1, int(floor * width) // step)
        costs = [
            np.interp(np.arange(least, widths[-1] // step + 1) * step, widths, values)
            for widths, values in zip(self.widths, self.costs, strict=True)
        ]
        chosen = cheapest(costs, width // step * len(costs) - least * len(costs))
        return [(least + more) * step for more in chosen]


def cheapest(costs: Sequence[np.ndarray], units: int) -> list[int]:
    """Return how many of `units` each item gets, all of them given away, for the least sum of costs.

    Args:
        costs: cost of each item with 0, 1, ... units.
        units: how many there are; no more than all items can take.
    """
    best = np.full(units + 1, np.inf)  # least cost of the items so far, by the units that they have
    best[0] = 0.0
    steps = []
    for values in costs:
        following, taken = np.full_like(best, np.inf), np.zeros(units + 1, np.int64)
        for count, cost in enumerate(values[: units + 1]):
            total = best[: units + 1 - count] + cost
            better = total < following[count:]
            following[count:][better] = total[better]
            taken[count:][better] = count
        best = following
        steps.append(taken)
    chosen, left = [], units
    for taken in reversed(steps):
        chosen.append(int(taken[left]))
        left -= chosen[-1]
    return chosen[::-1]
