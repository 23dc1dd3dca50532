"""Widths by trial: layers exchange neurons as long as the divergence from the dense model falls.

Scores say what a neuron is worth next to the others of its layer; how much one layer is worth next to another is
measured: the model is cut by candidate plans, and its KL divergence from the dense model read on a few windows.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.allocation import FLOOR, Budget, Shape, plan_with, share_out
from hifiprune.errors import UserError
from hifiprune.evaluation import Reference, measure_windows
from hifiprune.plan import Plan
from hifiprune.scores import Scores
from hifiprune.surgery import cut

POWERS = (1.0, 0.5, 0.25)
"""Exponents of the scores under the global thresholds that the search starts from; 0 would be uniform widths."""
TRIALS = 64


def search(
    model: PreTrainedModel,
    scores: Scores,
    budget: Budget,
    windows: Int[Tensor, "windows positions"],
    *,
    round_to: int = 128,
    floor: float = FLOOR,
    trials: int = TRIALS,
    seed: int = 0,
    batch_size: int = 1,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda trials: trials,
) -> Plan:
    """The plan whose plain cut diverges least from the dense model, of those that were tried.

    The first trials are uniform widths and global thresholds on powers of the scores. Each later one takes neurons
    from one random layer and gives them to another; the amount is halved after every quarter of the trials.

    Args:
        model: the dense model, whole again after.
        scores: of every neuron; they decide which neurons of a layer stay.
        budget: how much to remove.
        windows: token ids to measure the divergence on.
        round_to: widths become multiples of it.
        floor: fraction of the uniform width that every MLP keeps.
        trials: plans to try, one forward pass over the windows each.
        seed: of the random layers.
        batch_size: windows per step.
        track: wraps the numbers of the trials, to show progress.

    Raises:
        UserError: the budget cannot be met, there are too few trials, or the windows do not fit the model.
    """
    scores.require_finite()
    shape = Shape.of(scores)
    width = shape.width_at(budget, round_to)
    starts = [[width] * shape.mlps]
    for power in POWERS:
        gains = [(values.double() - values.min()).pow(power).sort(descending=True).values for values in scores.values]
        starts.append(share_out(gains, width * shape.mlps, round_to=round_to, floor=floor))
    if trials < len(starts):
        raise UserError(f"trials {trials} must be at least {len(starts)}, the plans that the search starts from")
    reference = Reference.of(model, windows, batch_size)
    chance = torch.Generator().manual_seed(seed)
    best, least = starts[0], float("inf")
    for trial in track(range(trials)):
        if trial < len(starts):
            widths = starts[trial]
        else:
            largest = max(round_to, shape.neurons // 8 // round_to * round_to)
            step = max(round_to, largest >> (4 * trial // trials) // round_to * round_to)
            widths = _exchanged(best, step, round(floor * width), shape.neurons, chance)
        plan = plan_with(scores, widths, budget)
        with cut(model, plan):
            divergence = float(measure_windows(model, windows, reference, batch_size=batch_size)["kl"].mean())
        if divergence < least:
            best, least = widths, divergence
    return plan_with(scores, best, budget)


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
