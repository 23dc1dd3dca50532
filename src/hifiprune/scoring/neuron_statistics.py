"""Statistics of neurons that a pass accumulates, and the scores computed from them.

A statistic reduces the activations of one layer and batch to `[statistics, neurons]`, which is summed over batches. A
finish turns the sum, and the weights, into one score per neuron.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hifiprune.engine.hooks import Activations, ProjectionPass
from hifiprune.engine.lm_head import at_least_float32
from hifiprune.models.mlp import Mlp


@dataclass(frozen=True)
class Sample:
    """The sample that was summed over.

    Attributes:
        windows: number of windows.
        positions: positions per window.
        passes: gradients per window.
        seed: seed of random draws.
        layer: index of the MLP.
    """

    windows: int
    positions: int
    passes: int
    seed: int
    layer: int


Statistic = Callable[[Activations], Float[Tensor, "statistics neurons"]]
Finish = Callable[[Float[Tensor, "statistics neurons"], Mlp, Sample], Float[Tensor, "neurons"]]


def absolute(seen: Activations) -> Float[Tensor, "1 neurons"]:
    """Sum the first-order Taylor importance `(h * dC/dh).abs()` over positions: eq. 4, arXiv 2603.08083."""
    total: Tensor = torch.linalg.vector_norm(seen.taylor.flatten(0, 1), 1, dim=0, keepdim=True)
    return total


def square(seen: Activations) -> Float[Tensor, "1 neurons"]:
    """Sum `(h * dC/dh) ** 2` over positions: large changes count for more than many small ones."""
    rows = seen.taylor.flatten(0, 1)
    if rows.device.type == "cpu":
        return rows.square().sum(0, keepdim=True)
    total: Tensor = torch.linalg.vector_norm(rows, 2, dim=0, keepdim=True)  # no square is written to memory
    return total.square_()


def weight_absolute(seen: Activations) -> Float[Tensor, "1 neurons"]:
    """Sum the weights' Taylor importance over windows: `|down + up + gate|` of `w * dC/dw`.

    Element `j` of neuron `i` is one weight of each projection: `gate[i, j]`, `up[i, j]` and `down[j, i]`; the
    products are added before the absolute value, which is taken per window, and averaged over `j`: arXiv 2506.11120.
    """
    *inputs, output = seen.projections
    scores = []
    for window in range(len(seen.activation)):
        product = _weight_product(output, window).T
        for each in inputs:
            product += _weight_product(each, window)
        scores.append(product.abs_().mean(1))
    return torch.stack(scores).sum(0, keepdim=True)


def _weight_product(each: ProjectionPass, window: int) -> Float[Tensor, "outputs inputs"]:
    slope = each.output[window].T @ each.input[window].to(each.output.dtype)  # dC/dw
    return at_least_float32(slope).mul_(each.linear.weight.detach())


def moments(seen: Activations) -> Float[Tensor, "2 neurons"]:
    """Sum `h` and `h ** 2` over positions."""
    h = at_least_float32(seen.activation.flatten(0, 1))
    return torch.stack((h.sum(0), h.square().sum(0)))


def squared_mean_magnitude(seen: Activations) -> Float[Tensor, "1 neurons"]:
    """Sum `h.abs().mean("positions") ** 2` over windows."""
    h = at_least_float32(seen.activation)
    means: Tensor = torch.linalg.vector_norm(h, 1, dim=1) / h.shape[1]
    return means.square_().sum(0, keepdim=True)


def as_summed(totals: Float[Tensor, "1 neurons"], mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Return the sum itself."""
    return totals[0]


def as_divergence(totals: Float[Tensor, "1 neurons"], mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Convert squared gradients of the mean over positions to nats of KL divergence per position.

    `KL / positions = 1/2 sum_t (h g_t) ** 2 / positions` with `g` the gradient of the sum over positions.
    """
    return totals[0] * sample.positions / (2 * sample.windows * sample.passes)


def wanda(totals: Float[Tensor, "2 neurons"], mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Average `|w| * ||h||` over the outputs: Wanda's metric averaged over a channel, as FLAP's authors do."""
    return totals[1].sqrt() * _norm(mlp.output.weight, 1, 0) / mlp.output.out_features


def flap(totals: Float[Tensor, "2 neurons"], mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Compute the weighted input feature variance, standardised in each layer: arXiv 2312.11983."""
    count = sample.windows * sample.positions
    variance = (totals[1] - totals[0].square() / count) / max(1, count - 1)
    metric = variance.clamp(min=0) * _norm(mlp.output.weight, 2, 0).square()
    return (metric - metric.mean()) / metric.std().clamp(min=torch.finfo(metric.dtype).tiny)


def mean_activation(totals: Float[Tensor, "2 neurons"], mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Average `h` over all positions."""
    return totals[0] / (sample.windows * sample.positions)


def minitron(totals: Float[Tensor, "1 neurons"], mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Compute the mean magnitude over a window's positions, with the l2 norm over windows: arXiv 2407.14679."""
    return totals[0].sqrt()


def magnitude(totals: Tensor, mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Compute the l2 norm of all weights of a neuron, without biases."""
    norms = [_norm(linear.weight, 2, 1) for linear in mlp.inputs]
    whole: Tensor = torch.linalg.vector_norm(torch.stack((*norms, _norm(mlp.output.weight, 2, 0))), 2, dim=0)
    return whole


def peak_to_peak(totals: Tensor, mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Sum the largest minus the smallest input weight of a neuron over its input projections."""
    return torch.stack([at_least_float32(linear.weight.amax(1) - linear.weight.amin(1)) for linear in mlp.inputs]).sum(
        0
    )


def random(totals: Tensor, mlp: Mlp, sample: Sample) -> Float[Tensor, "neurons"]:
    """Return uniform noise."""
    generator = torch.Generator().manual_seed(sample.seed * 1_000_003 + sample.layer)
    return torch.rand(mlp.neurons, generator=generator)


def _norm(weight: Tensor, order: int, dim: int) -> Float[Tensor, "neurons"]:
    """Compute the norm along a dimension in float32 or better, without a copy of the weight."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(weight.detach(), order, dim=dim, dtype=dtype)
    return norm


WITHOUT_WEIGHTS = (as_summed, as_divergence, minitron, random)
"""Finishes that read no weights, which a streamed model need not bring for them."""
