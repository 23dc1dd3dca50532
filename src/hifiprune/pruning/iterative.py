"""Iterative pruning: alternate scoring with cutting (and repairing) a part of the budget."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.config.groups import AllocationConfig, Budget
from hifiprune.engine.temporary_cut import cut
from hifiprune.io.pass_checkpoint import PassCheckpoint
from hifiprune.models.edit import others
from hifiprune.plan import ModelShape, Plan
from hifiprune.progress import labelled
from hifiprune.pruning.allocate import allocate
from hifiprune.pruning.repair import cut_and_repaired
from hifiprune.scores import Scores
from hifiprune.scoring.score import Request, score_all


def score_in_steps(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    request: Request,
    budget: Budget,
    *,
    steps: int,
    round_to: int = 128,
    allocation: AllocationConfig = AllocationConfig(),
    repair: bool = True,
    batch_size: int = 1,
    recompute: bool | None = None,
    settings: Mapping[str, object] | None = None,
    model_hash: str | None = None,
    keeper: PassCheckpoint | None = None,
) -> Scores:
    """Score, cut a part, repair, and score again; the model is restored afterwards.

    Neurons that were cut on the way have scores below all others, the first ones the lowest: one run gives nested plans
    for every ratio up to the budget.

    Args:
        model: the dense model.
        windows: token ids to score and repair on.
        request: criterion and its options.
        budget: how much to remove in total, in equal parts.
        steps: number of scoring rounds; the model is cut between them.
        round_to: final widths are multiples of it.
        allocation: how widths are decided, in every round.
        repair: whether to repair each intermediate cut.
        batch_size: windows per step.
        recompute: see `hifiprune.scoring.score.score_all`.
        settings: further facts to store with the scores.
        model_hash: see `hifiprune.scoring.score.score_all`.
        keeper: see `hifiprune.scoring.score.score_all`.

    Raises:
        UserError: as for `score` and `allocate`.
        RunError: as for `score`.
    """
    facts: dict[str, object] = {"steps": steps, "budget": str(budget), "allocation": asdict(allocation)}

    def scored(keeper: PassCheckpoint | None) -> Scores:
        (scores,) = score_all(
            model,
            windows,
            [request],
            batch_size=batch_size,
            recompute=recompute,
            settings={**(settings or {}), **facts},
            model_hash=model_hash,
            keeper=keeper,
        )
        return scores

    with labelled(f"scoring, step 1 of {steps}"):
        scores = scored(keeper)
    shape = ModelShape.of(scores)
    removed = shape.neurons - shape.width_at(budget, round_to)
    if allocation.method == "searched":
        allocation = replace(allocation, method="global")
    for step in range(1, steps):
        width = shape.neurons - -(-removed * step // steps)
        plan = allocate(scores, Budget(width=width), round_to=1, allocation=allocation)
        with ExitStack() as stack:
            if repair:
                with labelled(f"repairing after step {step}"):
                    stack.enter_context(cut_and_repaired(model, plan, windows, batch_size=batch_size))
            else:
                stack.enter_context(cut(model, plan))
            stack.enter_context(labelled(f"scoring, step {step + 1} of {steps}"))
            late = scored(keeper.of(facts, round_to, repair, step) if keeper else None)
        scores = replace(scores, values=_nested(scores.values, late.values, plan))
    return scores


def _nested(before: list[Tensor], late: list[Tensor], plan: Plan) -> list[Float[Tensor, "_"]]:
    """Return late scores of the remaining neurons; the others get scores below these and zero, in earlier order."""
    flat = torch.cat(before)
    starts = torch.tensor([0, *accumulate(len(each) for each in before)])
    staying = torch.cat([kept + start for kept, start in zip(plan.kept, starts, strict=False)])
    gone = others(staying, len(flat))
    gone = gone[flat[gone].argsort(stable=True)]
    whole, found = torch.empty_like(flat), torch.cat(late)
    whole[staying] = found
    whole[gone] = min(0.0, float(found.min())) - 1 + torch.arange(len(gone)) / len(gone)
    return list(whole.split([len(each) for each in before]))
