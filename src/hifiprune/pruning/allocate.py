"""From scores and a budget to the width of each layer and the neurons kept."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hifiprune.bounds import check_numbers
from hifiprune.errors import UserError, unknown
from hifiprune.plan import Plan, highest
from hifiprune.scores import Scores

ALLOCATIONS = ("uniform", "global", "searched")
EXPERT_STEP = 8
EXPERT = re.compile(r"experts\.\d+$")
"""How the name of an expert ends."""


@dataclass(frozen=True)
class Sharing:
    """How MLPs share the neurons that a budget leaves.

    Attributes:
        allocation: `uniform`, the same number in every MLP, which a stock configuration can state; `global`, one
            threshold over all MLPs, for scores that are on one scale; or `searched`, see `pruning.search_widths`.
        floor: fraction of the uniform width that every MLP keeps where widths differ, in [0, 1].
        trials: plans that a search tries.

    Raises:
        UserError: the allocation is not known, or a value is out of range.
    """

    allocation: str = "uniform"
    floor: float = 0.75
    trials: int = 64

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise unknown("allocation", self.allocation, ALLOCATIONS)
        check_numbers(vars(self))


@dataclass(frozen=True)
class Budget:
    """How much to remove; exactly one of the three.

    Attributes:
        ratio: fraction of the model's total parameters, in (0, 1).
        neuron_ratio: fraction of the MLP neurons, in (0, 1).
        width: neurons that every MLP keeps.

    Raises:
        UserError: none or several are given, or a value is out of range.
    """

    ratio: float | None = None
    neuron_ratio: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            flags = "--ratio, --neuron-ratio, --width"
            raise UserError(f"give exactly one of {flags}; given: {', '.join(given) or 'none'}")
        check_numbers(given)

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"{name.replace('_', '-')} {value:g}"


def in_proportion(width: int, of: int, neurons: int) -> int:
    """The width of an MLP of so many neurons where one `of` another number becomes `width`.

    Multiples stay multiples; else it is the nearest multiple of as large a power of two as `width` is one of, to 128.
    """
    if neurons % of == 0:
        return width * (neurons // of)
    step = min(128, width & -width)
    return min(neurons, max(step, step * math.floor(neurons * width / of / step + 0.5)))


@dataclass(frozen=True)
class Shape:
    """The sizes that turn a budget into a width.

    Attributes:
        neurons: width of every MLP; of several kinds, such as experts and plain ones, of those that are most.
        mlps: how many there are of that width.
        parameters_per_neuron: parameters that go with one neuron of these.
        total_parameters: of the model, tied weights counted once.
        others: neurons, parameters of each and number of the MLPs of every other kind.
        experts: whether there are experts, all of one width.
    """

    neurons: int
    mlps: int
    parameters_per_neuron: int
    total_parameters: int
    others: tuple[tuple[int, int, int], ...] = ()
    experts: bool = False

    @classmethod
    def of(cls, scores: Scores) -> "Shape":
        """The shape of the model that was scored.

        Raises:
            UserError: its MLPs differ in size, so that one width for all of them means nothing.
        """
        sizes = [(len(v), p) for v, p in zip(scores.values, scores.parameters_per_neuron, strict=True)]
        experts = any(EXPERT.search(name) for name in scores.names)
        return cls.from_sizes(sizes, scores.total_parameters, experts=experts)

    @classmethod
    def from_sizes(cls, sizes: Sequence[tuple[int, int]], total_parameters: int, *, experts: bool = False) -> "Shape":
        """From the neurons, and parameters that go with each, of every MLP; only beside experts they may differ."""
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
        """What an MLP of so many neurons keeps when those of the main kind keep `width`."""
        return in_proportion(width, self.neurons, neurons)

    def ratio_at(self, width: int) -> float:
        """Fraction of all parameters that is removed when every MLP of the main kind keeps `width` neurons."""
        gone = (self.neurons - width) * self.mlps * self.parameters_per_neuron
        gone += sum((neurons - self.width_of(neurons, width)) * each * count for neurons, each, count in self.others)
        return gone / self.total_parameters

    def check_experts(self, allocation: str, width: int) -> None:
        """Refuse what a model with experts cannot become, if this is one.

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
        """Parameters of all MLPs, for each neuron of the main kind."""
        all_of_them = [(self.neurons, self.parameters_per_neuron, self.mlps), *self.others]
        return sum(neurons * each * count for neurons, each, count in all_of_them) / self.neurons

    def width_at(self, budget: Budget, round_to: int = 1) -> int:
        """Width of every MLP for `budget`: the nearest multiple of `round_to`, never zero; `budget.width` is exact.

        Raises:
            UserError: the MLPs cannot give as much, or nothing would be removed.
        """
        check_numbers({"round_to": round_to})
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


def allocate(scores: Scores, budget: Budget, *, round_to: int = 128, sharing: Sharing = Sharing()) -> Plan:
    """Decide which neurons each MLP keeps: those with the highest scores.

    Ties keep the lower index, so equal scores always give the same plan.

    Args:
        scores: of every neuron.
        budget: how much to remove.
        round_to: widths become multiples of it.
        sharing: how widths are decided; a search is not made here.

    Raises:
        UserError: the budget cannot be met, or scores are not finite.
    """
    scores.require_finite()
    shape = Shape.of(scores)
    width = shape.width_at(budget, round_to)
    widths = [shape.width_of(len(values), width) for values in scores.values]
    if sharing.allocation == "global":
        shape.check_experts("global", width)
        widths = share_out(scores.values, width, round_to=round_to, floor=sharing.floor)
    return plan_with(scores, widths, budget)


def plan_with(scores: Scores, widths: Sequence[int], budget: Budget) -> Plan:
    """The plan that keeps the neurons with the highest scores, as many in each MLP as `widths` says."""
    neurons = [len(values) for values in scores.values]
    gone = [count - width for count, width in zip(neurons, widths, strict=True)]
    removed = sum(count * each for count, each in zip(gone, scores.parameters_per_neuron, strict=True))
    return Plan(
        kept=[highest(values, width) for values, width in zip(scores.values, widths, strict=True)],
        neurons=neurons,
        names=scores.names,
        ratio_asked=budget.ratio,
        ratio_reached=removed / scores.total_parameters,
        parameters_before=scores.total_parameters,
        parameters_after=scores.total_parameters - removed,
        criterion=scores.criterion,
        model_hash=scores.model_hash,
        data_hash=scores.data_hash,
    )


def share_out(values: Sequence[Float[Tensor, "neurons"]], width: int, *, round_to: int, floor: float) -> list[int]:
    """Widths of the mean `width` for which the neurons kept have the largest sum of values.

    Args:
        values: what each neuron of each MLP is worth.
        width: mean width.
        round_to: widths are multiples of it, or whole; any numbers where the mean is none.
        floor: fraction of the mean width that every MLP keeps.
    """
    step = step_of(width, round_to)
    falling = (each.double().sort(descending=True).values for each in values)
    steps = [[gain.mean().item() for gain in each.split(step)] for each in falling]
    mean = width // step
    least = max(1, int(floor * mean))
    free = [(gain, layer) for layer, own in enumerate(steps) for gain in own[least:]]
    chosen = sorted(free, key=lambda each: -each[0])[: (mean - least) * len(steps)]
    counts = Counter(layer for _, layer in chosen)
    return [min(len(own), (least + counts[layer]) * step) for layer, own in enumerate(values)]


def step_of(width: int, round_to: int) -> int:
    """What layers exchange neurons by: `round_to`, or one where a mean width was asked for that is no multiple."""
    return 1 if width % round_to else round_to
