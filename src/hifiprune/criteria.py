"""Named criteria: which objective a pass differentiates, how it accumulates, and where it comes from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hifiprune.errors import UserError, nearest_name
from hifiprune.objectives import Kernel, entropy_

Accumulator = Callable[
    [Float[Tensor, "windows positions neurons"], Float[Tensor, "windows positions neurons"]], Float[Tensor, "neurons"]
]
"""Turns a layer's `h` and `dC/dh`, which it may overwrite, into what one batch adds to the layer's scores."""


@dataclass(frozen=True)
class Criterion:
    """How neurons are scored; more is more important."""

    name: str
    summary: str
    objective: Kernel
    accumulate: Accumulator
    reference: str


def absolute_sum(
    activation: Float[Tensor, "windows positions neurons"], gradient: Float[Tensor, "windows positions neurons"]
) -> Float[Tensor, "neurons"]:
    """First-order Taylor importance, same as `(h * dC/dh).abs().sum((0, 1))` in float32; overwrites `gradient`."""
    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return precise.mul_(activation).abs_().sum((0, 1))  # eq. 4, arXiv 2603.08083


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "hfprune",
            "first-order change of the output entropy, sum of |h dH/dh|: the paper's exact definition, for good",
            entropy_,
            absolute_sum,
            "arXiv 2603.08083, eq. 3-4",
        ),
        Criterion(
            "entropy",
            "first-order change of the output entropy; the same as hfprune today, may get a better accumulator",
            entropy_,
            absolute_sum,
            "arXiv 2603.08083, eq. 3-4",
        ),
    )
}


def find_criterion(name: str) -> Criterion:
    """Return the criterion called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in CRITERIA:
        raise UserError(
            f"criterion '{name}' is not known; known are {', '.join(CRITERIA)}{nearest_name(name, CRITERIA)}"
        )
    return CRITERIA[name]
