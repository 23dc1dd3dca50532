"""Scores made along the way: a part is cut and repaired, and those who stay are scored anew in each other's company."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.bounds import check_numbers
from hifiprune.engine.temporary_cut import cut
from hifiprune.io.pass_checkpoint import Keeper
from hifiprune.models.edit import others
from hifiprune.plan import Budget, Plan, Shape
from hifiprune.progress import labelled
from hifiprune.pruning.allocate import Sharing, allocate
from hifiprune.pruning.repair import cut_and_repaired
from hifiprune.scores import Scores
from hifiprune.scoring.score import Request, score


@dataclass(frozen=True)
class Course:
    """In how many steps a model is cut on its way to a budget.

    Attributes:
        steps: how often it is scored; it is cut between.
        budget: how much is removed in the end; as much in every step.
        round_to: widths at the end are multiples of it.
        sharing: how widths are decided, also on the way.
        repair: whether each cut on the way is repaired.

    Raises:
        UserError: there are no steps.
    """

    steps: int
    budget: Budget
    round_to: int = 128
    sharing: Sharing = Sharing()
    repair: bool = True

    def __post_init__(self) -> None:
        check_numbers({"steps": self.steps, "round_to": self.round_to})


def score_in_steps(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    request: Request,
    course: Course,
    *,
    batch_size: int = 1,
    settings: dict[str, Any] | None = None,
    keeper: Keeper | None = None,
    **how: Any,
) -> Scores:
    """Score, cut a part, repair, and score again; the model is whole again after.

    Neurons that went on the way have scores below all others, those that went first the lowest: one run gives plans for
    every ratio up to the budget, each within the one before.

    Args:
        model: the dense model.
        windows: token ids, to score and to repair on.
        request: the criterion and its options.
        course: how much to cut, in how many steps.
        batch_size: windows per step.
        settings: more facts to keep in the scores.
        keeper: see `hifiprune.scoring.score.score_all`.
        how: see `hifiprune.scoring.score.score_all`.

    Raises:
        UserError: as for `score` and `allocate`.
        RunError: as for `score`.
    """
    facts = {"steps": course.steps, "budget": str(course.budget), "sharing": asdict(course.sharing)}
    how |= {"batch_size": batch_size, "settings": (settings or {}) | facts}
    with labelled(f"scoring, step 1 of {course.steps}"):
        scores = score(model, windows, *request, keeper=keeper, **how)
    shape = Shape.of(scores)
    removed = shape.neurons - shape.width_at(course.budget, course.round_to)
    sharing = course.sharing
    if sharing.allocation == "searched":
        sharing = replace(sharing, allocation="global")
    for step in range(1, course.steps):
        width = shape.neurons - -(-removed * step // course.steps)
        plan = allocate(scores, Budget(width=width), round_to=1, sharing=sharing)
        with ExitStack() as stack:
            if course.repair:
                with labelled(f"repairing after step {step}"):
                    stack.enter_context(cut_and_repaired(model, plan, windows, batch_size=batch_size))
            else:
                stack.enter_context(cut(model, plan))
            stack.enter_context(labelled(f"scoring, step {step + 1} of {course.steps}"))
            known = keeper.of(facts, course.round_to, course.repair, step) if keeper else None
            late = score(model, windows, *request, keeper=known, **how)
        scores = replace(scores, values=_nested(scores.values, late.values, plan))
    return scores


def _nested(before: list[Tensor], late: list[Tensor], plan: Plan) -> list[Float[Tensor, "_"]]:
    """Late scores for those who stay; below them and zero the others, in the order of what they had before."""
    flat = torch.cat(before)
    starts = torch.tensor([0, *accumulate(len(each) for each in before)])
    staying = torch.cat([kept + start for kept, start in zip(plan.kept, starts, strict=False)])
    gone = others(staying, len(flat))
    gone = gone[flat[gone].argsort(stable=True)]
    whole, found = torch.empty_like(flat), torch.cat(late)
    whole[staying] = found
    whole[gone] = min(0.0, float(found.min())) - 1 + torch.arange(len(gone)) / len(gone)
    return list(whole.split([len(each) for each in before]))
