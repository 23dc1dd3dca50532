"""Search for widths: layers exchange neurons as long as the divergence from the dense model falls.

Scores rank the neurons within a layer; the value of one layer against another is measured: the model is cut by
candidate plans, and its KL divergence from the dense model is computed on a few windows.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.config.groups import AllocationConfig, Budget
from hifiprune.engine.temporary_cut import cut
from hifiprune.plan import ModelShape, Plan
from hifiprune.progress import track
from hifiprune.pruning.allocate import allocate_widths, plan_with, width_step
from hifiprune.scores import Scores

WINDOWS, POSITIONS = 4, 512
"""Number of calibration windows to measure on, and the positions used of each."""


def search(
    model: PreTrainedModel,
    scores: Scores,
    budget: Budget,
    divergence: Callable[[], float],
    *,
    round_to: int = 128,
    allocation: AllocationConfig = AllocationConfig("searched"),
    seed: int = 0,
) -> Plan:
    """Return the plan whose plain cut diverges least from the dense model, among those tried.

    The first trials are uniform widths, a global threshold on the scores, and one with a floor halfway between. Each
    later trial takes neurons from one random layer and gives them to another; the amount is halved after every quarter
    of the trials.

    Args:
        model: the dense model, restored afterwards.
        scores: scores of every neuron; they rank the neurons within a layer.
        budget: how much to remove.
        divergence: measures the divergence of `model`, as it is cut at the moment, from the dense model.
        round_to: widths become multiples of it.
        allocation: floor and number of trials, one forward pass over the windows each.
        seed: seed of the random layers.

    Raises:
        UserError: the budget cannot be met, or the windows do not fit the model.
    """
    scores.require_finite()
    shape = ModelShape.of(scores)
    width = shape.width_at(budget, round_to)
    floors = (1.0, (1 + allocation.floor) / 2, allocation.floor)
    starts = [allocate_widths(scores.values, width, round_to=round_to, floor=floor) for floor in floors]
    unit = width_step(width, round_to)
    chance = torch.Generator().manual_seed(seed)
    best, least = starts[0], float("inf")
    tried: set[tuple[int, ...]] = set()
    for trial in track(range(allocation.trials), "searching widths"):
        if trial < len(starts):
            widths = starts[trial]
        else:
            step = exchange_size(shape.neurons, unit, trial / allocation.trials)
            widths = _exchanged(best, step, int(allocation.floor * width), shape.neurons, chance)
        if tuple(widths) in tried:
            continue
        tried.add(tuple(widths))
        plan = plan_with(scores, widths, budget)
        with cut(model, plan):
            measured = divergence()
        if measured < least:
            best, least = widths, measured
    return plan_with(scores, best, budget)


def exchange_size(neurons: int, unit: int, share: float) -> int:
    """Return how many neurons a trial moves after a `share` of the trials: multiples of `unit`, halved each quarter."""
    return max(unit, (neurons // 8 >> int(4 * share)) // unit * unit)


def search_windows(windows: Int[Tensor, "windows positions"]) -> Int[Tensor, "few positions"]:
    """Select a few evenly spread calibration windows to search on."""
    return windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS, :POSITIONS]


def _exchanged(widths: list[int], step: int, least: int, most: int, chance: torch.Generator) -> list[int]:
    """Move `step` neurons from one random layer to another, if their widths allow it."""
    pairs = [
        (giver, taker)
        for giver, has in enumerate(widths)
        for taker, had in enumerate(widths)
        if giver != taker and has - step >= max(1, least) and had + step <= most
    ]
    if not pairs:
        return widths
    giver, taker = pairs[int(torch.randint(len(pairs), (), generator=chance))]
    changed = list(widths)
    changed[giver] -= step
    changed[taker] += step
    return changed
