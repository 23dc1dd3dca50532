"""`Plan`: which neurons every MLP keeps, decided before anything is cut."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.json_files import checked, read_text
from hifiprune.io.schemas import PlanFile

FORMAT = "hifiprune-plan-1"


def highest(scores: Float[Tensor, "neurons"], width: int) -> Int[Tensor, "width"]:
    """Indices of the `width` highest scores in ascending order; ties keep the lower index."""
    return torch.sort(scores, descending=True, stable=True).indices[:width].sort().values


@dataclass(frozen=True)
class Plan:
    """The neurons kept, one ascending int64 tensor an MLP in layer order, and what they were decided from.

    Attributes:
        kept: indices of the neurons kept.
        neurons: width of each MLP before.
        names: path of each MLP in the model.
        ratio_asked: fraction of all parameters that was to be removed, where that was the budget.
        ratio_reached: fraction that is removed.
        parameters_before: of the model, tied weights counted once.
        parameters_after: likewise, once cut.
        criterion: name of the criterion of the scores.
        model_hash: SHA-256 of the dense weights that were scored, for the record.
        data_hash: SHA-256 of the calibration windows.
    """

    kept: list[Int[Tensor, "_"]]
    neurons: list[int]
    names: list[str]
    ratio_asked: float | None
    ratio_reached: float
    parameters_before: int
    parameters_after: int
    criterion: str = ""
    model_hash: str = ""
    data_hash: str = ""

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.kept) == len(self.neurons):
            sizes = f"{len(self.names)} names, {len(self.kept)} lists of neurons, {len(self.neurons)} widths"
            raise UserError(f"a plan must have as many of each, one an MLP: {sizes}")
        for name, kept, neurons in zip(self.names, self.kept, self.neurons, strict=True):
            ascending = len(kept) > 0 and bool((kept.diff() > 0).all())
            if not ascending or not 0 <= int(kept[0]) <= int(kept[-1]) < neurons:
                raise UserError(f"the plan for {name} must keep neurons of 0 to {neurons - 1} in ascending order")

    @property
    def widths(self) -> list[int]:
        """How many neurons each MLP keeps."""
        return [len(kept) for kept in self.kept]

    def to_json(self) -> str:
        """The plan as JSON text, the same bytes for the same plan."""
        facts = asdict(self) | {"format": FORMAT, "kept": [kept.tolist() for kept in self.kept]}
        return json.dumps(facts, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, in place of a file that hifiprune wrote, but of no other."""
        with replacing(path, overwrite=True) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            UserError: the file is missing, holds no plan, or was changed.
        """
        text = read_text(local_path(path))
        if f'"{FORMAT}"' not in text:
            raise UserError(f"{path} is not a readable plan in the format {FORMAT}; 'hifiprune prune' writes one")
        facts = checked(text, PlanFile, str(path))
        kept = [torch.tensor(indices, dtype=torch.int64) for indices in facts["kept"]]
        names = [field.name for field in fields(cls) if field.name != "kept"]
        return cls(kept=kept, **{name: facts[name] for name in names})
