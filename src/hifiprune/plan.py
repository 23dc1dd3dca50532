"""`Budget`, the sizes of a model, and `Plan`: which neurons every MLP keeps, decided before anything is cut."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from hifiprune.bounds import COUNT, check_number
from hifiprune.config.groups import Budget
from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.json_files import Count, checked, read_text
from hifiprune.scores import Scores

FORMAT = "hifiprune-plan-1"
Index = Annotated[int, Field(ge=0, lt=2**31)]


class PlanFile(TypedDict):
    """The plan as its file has it."""

    format: Literal["hifiprune-plan-1"]
    kept: Annotated[list[list[Index]], Field(min_length=1)]
    neurons: list[Count]
    names: list[str]
    ratio_asked: float | None
    ratio_reached: float
    parameters_before: Annotated[int, Field(ge=0)]
    parameters_after: Annotated[int, Field(ge=0)]
    criterion: str
    model_hash: str
    data_hash: str


def top_indices(scores: Float[Tensor, "neurons"], width: int) -> Int[Tensor, "width"]:
    """Return the indices of the `width` highest scores in ascending order; ties keep the lower index."""
    return torch.sort(scores, descending=True, stable=True).indices[:width].sort().values


@dataclass(frozen=True)
class Plan:
    """The neurons to keep, one ascending int64 tensor per MLP in layer order, and the origin of the decision.

    Attributes:
        kept: indices of the neurons kept.
        neurons: width of each MLP before the cut.
        names: path of each MLP in the model.
        ratio_asked: requested fraction of all parameters to remove, if that was the budget.
        ratio_reached: fraction of all parameters that is removed.
        parameters_before: parameters of the dense model, tied weights counted once.
        parameters_after: parameters after the cut.
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
        """Return the number of neurons that each MLP keeps."""
        return [len(kept) for kept in self.kept]

    def to_json(self) -> str:
        """Serialize to JSON; the same plan gives the same bytes."""
        facts = asdict(self) | {"format": FORMAT, "kept": [kept.tolist() for kept in self.kept]}
        return json.dumps(facts, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; only a file that hifiprune wrote is replaced."""
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
        facts: PlanFile = checked(text, PlanFile, str(path))
        kept = [torch.tensor(indices, dtype=torch.int64) for indices in facts["kept"]]
        arguments: dict[str, Any] = {name: value for name, value in facts.items() if name not in ("format", "kept")}
        return cls(kept=kept, **arguments)


EXPERT_STEP = 8
EXPERT = re.compile(r"experts\.\d+$")
"""Matches the end of an expert's name."""


def proportional_width(width: int, of: int, neurons: int) -> int:
    """Return the width for an MLP of `neurons` when one of `of` neurons is reduced to `width`.

    If `neurons` is a multiple of `of`, so are the widths; otherwise it is the nearest multiple of the largest power of
    two, up to 128, that divides `width`.
    """
    if neurons % of == 0:
        return width * (neurons // of)
    step = min(128, width & -width)
    return min(neurons, max(step, step * math.floor(neurons * width / of / step + 0.5)))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that turn a budget into a width.

    Attributes:
        neurons: width of the MLPs; of the most frequent kind if there are several, such as experts and plain ones.
        mlps: number of MLPs of that kind.
        parameters_per_neuron: parameters of one of their neurons.
        total_parameters: parameters of the model, tied weights counted once.
        others: width, parameters per neuron and number of MLPs for every other kind.
        experts: whether there are experts, all of one width.
    """

    neurons: int
    mlps: int
    parameters_per_neuron: int
    total_parameters: int
    others: tuple[tuple[int, int, int], ...] = ()
    experts: bool = False

    @classmethod
    def of(cls, scores: Scores) -> "ModelShape":
        """Return the sizes of the model that was scored.

        Raises:
            UserError: its MLPs differ in size, so that one width for all of them means nothing.
        """
        sizes = [(len(v), p) for v, p in zip(scores.values, scores.parameters_per_neuron, strict=True)]
        experts = any(EXPERT.search(name) for name in scores.names)
        return cls.from_sizes(sizes, scores.total_parameters, experts=experts)

    @classmethod
    def from_sizes(
        cls, sizes: Sequence[tuple[int, int]], total_parameters: int, *, experts: bool = False
    ) -> "ModelShape":
        """Return the sizes, given width and parameters per neuron of every MLP, which may differ only with experts."""
        (main, count), *rest = Counter(sizes).most_common()
        if rest and not experts:
            widths = sorted({neurons for neurons, _ in sizes})
            raise UserError(
                f"the MLPs differ in neurons, {widths[0]} to {widths[-1]}, or in parameters of each; a budget needs "
                "equal ones: prune the dense model"
            )
        others = tuple((*size, number) for size, number in rest)
        return cls(main[0], count, main[1], total_parameters, others, experts)

    def width_of(self, neurons: int, width: int) -> int:
        """Return the width of an MLP of `neurons` when those of the main kind keep `width`."""
        return proportional_width(width, self.neurons, neurons)

    def ratio_at(self, width: int) -> float:
        """Return the fraction of all parameters that is removed when MLPs of the main kind keep `width` neurons."""
        gone = (self.neurons - width) * self.mlps * self.parameters_per_neuron
        gone += sum((neurons - self.width_of(neurons, width)) * each * count for neurons, each, count in self.others)
        return gone / self.total_parameters

    def check_experts(self, allocation: str, width: int) -> None:
        """Refuse widths that a model with experts cannot have.

        Raises:
            UserError: widths would differ, or the products of all experts at once, as most engines and transformers
                make them, could not read theirs, whose rows must take a multiple of 16 bytes.
        """
        if self.experts and allocation != "uniform":
            raise UserError("experts have one width, which the configuration states for all: --allocation uniform")
        if self.experts and width % EXPERT_STEP:
            raise UserError(
                f"width {width} of experts must be a multiple of {EXPERT_STEP}, as grouped matrix products want it; "
                f"use --round-to {EXPERT_STEP} or a multiple of it"
            )

    @property
    def removable(self) -> float:
        """Return the parameters of all MLPs per neuron of the main kind."""
        all_of_them = [(self.neurons, self.parameters_per_neuron, self.mlps), *self.others]
        return sum(neurons * each * count for neurons, each, count in all_of_them) / self.neurons

    def width_at(self, budget: Budget, round_to: int = 1) -> int:
        """Return the width for a budget: the nearest multiple of `round_to`, never zero; `budget.width` is exact.

        Raises:
            UserError: the MLPs cannot give as much, or nothing would be removed.
        """
        check_number("round-to", round_to, COUNT)
        if budget.width is not None:
            if budget.width >= self.neurons:
                raise UserError(f"width {budget.width} must be below the model's own width {self.neurons}")
            return budget.width
        if budget.ratio is not None:
            exact = self.neurons - budget.ratio * self.total_parameters / self.removable
        else:
            assert budget.neuron_ratio is not None
            exact = self.neurons * (1 - budget.neuron_ratio)
        if exact < 1:
            largest = math.floor(self.ratio_at(1) * 1000) / 1000
            raise UserError(
                f"{budget} is more than the MLPs hold: with one neuron left in each, {largest:.1%} of all parameters "
                f"are gone; the largest possible --ratio is {largest:g}, --neuron-ratio {1 - 1 / self.neurons:.4g}"
            )
        width = max(round_to, round_to * math.floor(exact / round_to + 0.5))
        if width >= self.neurons:
            raise UserError(
                f"nothing would be removed: the width {exact:.0f}, rounded to a multiple of {round_to}, is not below "
                f"the model's {self.neurons}; use a larger ratio or --round-to 1"
            )
        return width
