"""From scores and a budget to the width of each layer and the neurons kept."""

import math
from dataclasses import dataclass

from hifiprune.errors import UserError
from hifiprune.plan import Plan, highest
from hifiprune.scores import Scores


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
        for name in ("ratio", "neuron_ratio"):
            value = given.get(name)
            if value is not None and not 0 < value < 1:
                meant = value - 1 if 1 < value < 2 else value / 100
                hint = f"; did you mean {meant:g}?" if 1 < value < 100 else ""
                raise UserError(f"{name.replace('_', '-')} {value:g} must lie in (0, 1){hint}")
        if self.width is not None and self.width < 1:
            raise UserError(f"width {self.width} must be at least 1")

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"{name.replace('_', '-')} {value:g}"


@dataclass(frozen=True)
class Shape:
    """The sizes that turn a budget into a width.

    Attributes:
        neurons: width of every MLP.
        mlps: how many there are.
        parameters_per_neuron: parameters that go with one neuron.
        total_parameters: of the model, tied weights counted once.
    """

    neurons: int
    mlps: int
    parameters_per_neuron: int
    total_parameters: int

    @classmethod
    def of(cls, scores: Scores) -> "Shape":
        """The shape of the model that was scored.

        Raises:
            UserError: its MLPs differ in size, so that one width for all of them means nothing.
        """
        sizes = {(len(v), p) for v, p in zip(scores.values, scores.parameters_per_neuron, strict=True)}
        if len(sizes) != 1:
            raise UserError(
                f"the MLPs differ in neurons and parameters each: {sorted(sizes)}; one width needs equal ones"
            )
        ((neurons, parameters),) = sizes
        return cls(neurons, len(scores.values), parameters, scores.total_parameters)

    def ratio_at(self, width: int) -> float:
        """Fraction of all parameters that is removed when every MLP keeps `width` neurons."""
        return (self.neurons - width) * self.mlps * self.parameters_per_neuron / self.total_parameters

    def width_at(self, budget: Budget, round_to: int = 1) -> int:
        """Width of every MLP for `budget`: the nearest multiple of `round_to`, never zero; `budget.width` is exact.

        Raises:
            UserError: the MLPs cannot give as much, or nothing would be removed.
        """
        if round_to < 1:
            raise UserError(f"round-to {round_to} must be at least 1")
        if budget.width is not None:
            if budget.width >= self.neurons:
                raise UserError(f"width {budget.width} must be below the model's own width {self.neurons}")
            return budget.width
        if budget.ratio is not None:
            exact = self.neurons - budget.ratio * self.total_parameters / (self.mlps * self.parameters_per_neuron)
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


def allocate(scores: Scores, budget: Budget, *, round_to: int = 128) -> Plan:
    """Decide which neurons each MLP keeps: the same number in every MLP, those with the highest scores.

    Ties keep the lower index, so equal scores always give the same plan.

    Raises:
        UserError: the budget cannot be met, or scores are not finite.
    """
    scores.require_finite()
    shape = Shape.of(scores)
    width = shape.width_at(budget, round_to)
    kept = [highest(values, width) for values in scores.values]
    return Plan(
        kept=kept,
        neurons=[shape.neurons] * shape.mlps,
        names=scores.names,
        ratio_asked=budget.ratio,
        ratio_reached=shape.ratio_at(width),
        parameters_before=shape.total_parameters,
        parameters_after=shape.total_parameters - (shape.neurons - width) * shape.mlps * shape.parameters_per_neuron,
        criterion=scores.criterion,
        model_hash=scores.model_hash,
        data_hash=scores.data_hash,
    )
