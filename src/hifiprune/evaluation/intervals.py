"""Estimates with bootstrap confidence intervals over windows."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over windows with its percentile bootstrap 95% interval, which needs at least two windows."""

    value: float
    low: float | None = None
    high: float | None = None

    def exp(self) -> "Estimate":
        """The estimate of `exp` of the mean; percentiles carry over because `exp` is monotone."""
        return Estimate(*(None if x is None else math.exp(min(x, 700.0)) for x in (self.value, self.low, self.high)))  # type: ignore[arg-type]


def bootstrap_mean(values: Float[Tensor, "windows"], seed: int = 0) -> Estimate:
    """Mean of `values` with a 95% percentile interval from 2,000 resamples of the windows, in float64."""
    values = values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return Estimate(mean)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high)
