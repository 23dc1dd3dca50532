"""Widths by trial: layers exchange neurons as long as the divergence from the dense model falls.

Scores say what a neuron is worth next to the others of its layer; how much one layer is worth next to another is
measured: the model is cut by candidate plans, and its KL divergence from the dense model read on a few windows.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.config.groups import AllocationConfig, Budget
from hifiprune.engine.temporary_cut import cut
from hifiprune.plan import Plan, Shape
from hifiprune.progress import track
from hifiprune.pruning.allocate import plan_with, share_out, step_of
from hifiprune.scores import Scores

WINDOWS, POSITIONS = 4, 512
"""How many calibration windows a search measures on, and how much of each at most."""


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
    """The plan whose plain cut diverges least from the dense model, of those that were tried.

    The first trials are uniform widths, a global threshold on the scores, and one with a floor halfway between. Each
    later trial takes neurons from one random layer and gives them to another; the amount is halved after every quarter
    of the trials.

    Args:
        model: the dense model, whole again after.
        scores: of every neuron; they decide which neurons of a layer stay.
        budget: how much to remove.
        divergence: measures how far `model`, as it is cut at the moment, diverges from what it was.
        round_to: widths become multiples of it.
        allocation: the floor, and how many plans to try, a forward pass over the windows each.
        seed: of the random layers.

    Raises:
        UserError: the budget cannot be met, or the windows do not fit the model.
    """
    scores.require_finite()
    shape = Shape.of(scores)
    width = shape.width_at(budget, round_to)
    floors = (1.0, (1 + allocation.floor) / 2, allocation.floor)
    starts = [share_out(scores.values, width, round_to=round_to, floor=floor) for floor in floors]
    unit = step_of(width, round_to)
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
    """How many neurons a trial moves, a multiple of `unit`, after a `share` of all trials: halved at every quarter."""
    return max(unit, (neurons // 8 >> int(4 * share)) // unit * unit)


def search_windows(windows: Int[Tensor, "windows positions"]) -> Int[Tensor, "few positions"]:
    """A few of the calibration windows, evenly spread, to search on."""
    return windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS, :POSITIONS]


def _exchanged(widths: list[int], step: int, least: int, most: int, chance: torch.Generator) -> list[int]:
    """One layer gives `step` neurons to another, where their widths allow it."""
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
