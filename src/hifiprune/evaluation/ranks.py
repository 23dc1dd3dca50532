"""Rank correlation with intervals."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.stats import ConstantInputWarning, pearsonr, rankdata
from torch import Tensor

from hifiprune.evaluation.bootstrap import RESAMPLES, percentiles
from hifiprune.results import Estimate


def correlation(scores: Float[Tensor, "_"], truth: Float[Tensor, "_"], strata: Sequence[int]) -> Estimate:
    """Average Spearman's rank correlation over strata, with a 95% interval from resamples within them.

    Strata with fewer than three members, or with equal scores, have no correlation and are skipped.
    """
    members = [torch.tensor([i for i, s in enumerate(strata) if s == stratum]) for stratum in sorted(set(strata))]
    members = [chosen for chosen in members if len(chosen) > 2]
    if not members:
        return Estimate(float("nan"), None, None)
    chance = torch.Generator().manual_seed(0)
    drawn = [chosen[torch.randint(len(chosen), (RESAMPLES, len(chosen)), generator=chance)] for chosen in members]
    resampled = torch.stack([spearman(scores[each], truth[each]) for each in drawn]).nanmean(0)
    value = torch.stack([spearman(scores[chosen], truth[chosen]) for chosen in members]).nanmean()
    return Estimate(float(value), *percentiles(resampled))


def spearman(first: Float[Tensor, "*rows n"], second: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Compute Spearman's rank correlation along the last dimension; ties get the mean of their ranks.

    Same as `scipy.stats.spearmanr` of each pair of rows, without a call for each.
    """
    ranks = [rankdata(values.double().numpy(), axis=-1) for values in (first, second)]
    with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
        return torch.as_tensor(pearsonr(*ranks, axis=-1).statistic)
