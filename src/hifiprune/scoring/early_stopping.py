"""Stop scoring early, once more windows would hardly change which neurons are kept.

Scores from two disjoint halves of the windows so far are independent draws. If their noise falls with the square root
of the windows, the kept sets of two halves of `n` windows disagree twice as much as one of all `n` and one of the
whole calibration set would, if that were endless; of a set of `N` windows, which holds the `n`, `sqrt(1 - n / N)` of
that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hifiprune.errors import UserError
from hifiprune.io.distributed import processes
from hifiprune.plan import Plan
from hifiprune.progress import logger
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import find_criterion

LEAST = 8
GROWTH = 1.25


@dataclass
class Stability:
    """Stops scoring once the kept set is stable, and records how it converged.

    Attributes:
        wanted: required overlap of the kept set with that of all windows, as a share of the neurons kept.
        select: returns the plan for given scores.
        curve: for every check the windows so far, the overlap of their halves, and its extrapolation.
    """

    wanted: float
    select: Callable[[Scores], Plan]
    curve: list[dict[str, float]] = field(default_factory=list)

    def check(self, criteria: Sequence[str]) -> None:
        """Refuse criteria and runs that cannot stop early.

        Raises:
            UserError: there are several criteria or processes, or the criterion has two stages or reads no text.
        """
        found = [find_criterion(name) for name in criteria]
        if processes() > 1 or len(found) > 1 or any(each.two_stages or not each.statistic for each in found):
            raise UserError("until-stable watches one criterion that reads a text once, in one process: leave it out")

    def settled(self, windows: int, of: int, halves: Callable[[], tuple[Scores, Scores]]) -> bool:
        """Return whether the scores of the first `windows` of a larger number are enough."""
        one, other = (self.select(scores) for scores in halves())
        agreement = overlap(one, other)
        extrapolated = 1 - (1 - agreement) / 2 * math.sqrt(1 - windows / of)
        self.curve.append({"windows": windows, "halves": agreement, "extrapolated": extrapolated})
        logger.info(
            f"{windows} of {of} windows: two halves agree on {agreement:.2%} of the kept neurons, so all of them would "
            f"on about {extrapolated:.2%}"
        )
        return extrapolated >= self.wanted


def looks(windows: int, batch_size: int) -> list[int]:
    """Return the numbers of batches, all even, after which to check for stability.

    The first check is after `LEAST` windows, each further one after a quarter more.
    """
    found, batches = [], 2 * math.ceil(LEAST / (2 * batch_size))
    while batches * batch_size < windows:
        found.append(batches)
        batches = 2 * math.ceil(batches * GROWTH / 2)
    return found


def overlap(one: Plan, other: Plan) -> float:
    """Compute the share of one plan's kept neurons that the other keeps too."""
    shared = sum(
        len(set(ours.tolist()) & set(theirs.tolist())) for ours, theirs in zip(one.kept, other.kept, strict=True)
    )
    return shared / sum(one.widths)
