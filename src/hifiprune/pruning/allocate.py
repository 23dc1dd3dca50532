"""Decide the width of each layer and the neurons to keep, from scores and a budget."""

from collections import Counter
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hifiprune.config.groups import AllocationConfig, Budget
from hifiprune.plan import ModelShape, Plan, top_indices
from hifiprune.scores import Scores
from hifiprune.width_table import WidthTable


def allocate(
    scores: Scores, budget: Budget, *, round_to: int = 128, allocation: AllocationConfig = AllocationConfig()
) -> Plan:
    """Decide which neurons each MLP keeps: those with the highest scores.

    Ties keep the lower index, so equal scores always give the same plan.

    Args:
        scores: scores of every neuron.
        budget: how much to remove.
        round_to: widths become multiples of it.
        allocation: how widths are decided.

    Raises:
        UserError: the budget cannot be met, or scores are not finite.
    """
    scores.require_finite()
    shape = ModelShape.of(scores)
    width = shape.width_at(budget, round_to)
    widths = [shape.width_of(len(values), width) for values in scores.values]
    if allocation.method == "global":
        shape.check_experts("global", width)
        widths = allocate_widths(scores.values, width, round_to=round_to, floor=allocation.floor)
    elif allocation.table:
        shape.check_experts("table", width)
        table = WidthTable.load(allocation.table)
        table.require_scores(scores)
        widths = table.best_widths(width, round_to=round_to, floor=allocation.floor)
    neurons = [len(values) for values in scores.values]
    gone = [count - width for count, width in zip(neurons, widths, strict=True)]
    removed = sum(count * each for count, each in zip(gone, scores.parameters_per_neuron, strict=True))
    return Plan(
        kept=[top_indices(values, width) for values, width in zip(scores.values, widths, strict=True)],
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


def allocate_widths(
    values: Sequence[Float[Tensor, "neurons"]], width: int, *, round_to: int, floor: float
) -> list[int]:
    """Return the widths, with mean `width`, that maximize the sum of the kept neurons' values.

    Args:
        values: value of each neuron of each MLP.
        width: mean width.
        round_to: widths are multiples of it, or unchanged; any numbers if `width` is no multiple.
        floor: fraction of the mean width that every MLP keeps.
    """
    step = 1 if width % round_to else round_to
    ranked = (scores.double().sort(descending=True).values for scores in values)
    step_values = [[part.mean().item() for part in scores.split(step)] for scores in ranked]
    mean = width // step
    least = max(1, int(floor * mean))
    above_floor = [(value, layer) for layer, steps in enumerate(step_values) for value in steps[least:]]
    chosen = sorted(above_floor, key=lambda pair: -pair[0])[: (mean - least) * len(step_values)]
    counts = Counter(layer for _, layer in chosen)
    return [min(len(scores), (least + counts[layer]) * step) for layer, scores in enumerate(values)]
