"""Rank correlation with intervals."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hifiprune.evaluation.bootstrap import RESAMPLES, Estimate, percentiles


def correlation(scores: Float[Tensor, "_"], truth: Float[Tensor, "_"], strata: Sequence[int]) -> Estimate:
    """Average Spearman's rank correlation over strata, with a 95% interval from resamples within them.

    Strata with fewer than three members, or with equal scores, have no correlation and are skipped.
    """
    members = [torch.tensor([i for i, s in enumerate(strata) if s == stratum]) for stratum in sorted(set(strata))]
    members = [chosen for chosen in members if len(chosen) > 2]
    if not members:
        return Estimate(float("nan"))
    chance = torch.Generator().manual_seed(0)
    drawn = [chosen[torch.randint(len(chosen), (RESAMPLES, len(chosen)), generator=chance)] for chosen in members]
    resampled = torch.stack([spearman(scores[each], truth[each]) for each in drawn]).nanmean(0)
    value = torch.stack([spearman(scores[chosen], truth[chosen]) for chosen in members]).nanmean()
    return Estimate(float(value), *percentiles(resampled))


def spearman(first: Float[Tensor, "*rows n"], second: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Compute Spearman's rank correlation along the last dimension; ties get the mean of their ranks."""
    ranks = [_ranks(values.double()) for values in (first, second)]
    centred = [each - each.mean(-1, keepdim=True) for each in ranks]
    product: Tensor = torch.linalg.vecdot(*centred) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))
    return product


def _ranks(values: Tensor) -> Tensor:
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + upto).double() / 2
