"""Estimates with bootstrap confidence intervals over windows."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hifiprune.results import Estimate

RESAMPLES = 2000


def bootstrap_mean(values: Float[Tensor, "windows"], seed: int = 0) -> Estimate:
    """Average `values`, with a 95% percentile interval from 2,000 resamples of the windows, in float64."""
    return bootstrap_average([values], seed)


def bootstrap_average(groups: Sequence[Float[Tensor, "_"]], seed: int = 0) -> Estimate:
    """Average the groups' means, with a 95% percentile interval; items are resampled within their group."""
    mean = sum(group.double().mean().item() for group in groups) / len(groups)
    if any(len(group) < 2 for group in groups):
        return Estimate(mean, None, None)
    generator = torch.Generator().manual_seed(seed)
    drawn = sum(_counts(len(group), generator) @ (group.double() / len(group)) for group in groups)
    assert isinstance(drawn, Tensor)
    return Estimate(mean, *percentiles(drawn / len(groups)))


def bootstrap_paired(differences: Float[Tensor, "seeds windows"], seed: int = 0) -> Estimate:
    """Average paired differences, with a 95% percentile interval; seeds and windows are both resampled."""
    differences = differences.double()
    mean = differences.mean().item()
    seeds, windows = differences.shape
    if windows < 2:
        return Estimate(mean, None, None)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (_counts(size, generator) for size in (seeds, windows))
    return Estimate(mean, *percentiles(((rows @ differences) * columns).sum(1) / (seeds * windows)))


def _counts(size: int, generator: torch.Generator) -> Float[Tensor, "resamples size"]:
    """Count how often each of `size` items occurs in each resample."""
    drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
    return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def percentiles(means: Float[Tensor, "resamples"]) -> tuple[float, float]:
    """Return the 2.5% and 97.5% quantiles, ignoring NaN."""
    low, high = torch.nanquantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
