"""Second-order selection that accounts for repair: the loss when a neuron is removed and the others are refitted.

With activations `h` and the output projection `W`, removing neurons and refitting the others by least squares changes
the MLP's output by `W h - W' h_K`. Its cost is measured in the metric of the KL divergence there, the covariance `F` of
the gradient of the log-likelihood of the model's own labels, taken as independent of `h` (Kronecker-factored curvature,
arXiv 1503.05671). For one neuron the least cost has a closed form, that of the optimal brain surgeon:
`(w_i^T F w_i) / [G^-1]_ii` with `G = E[h h^T]`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 8
"""Neurons removed between two updates of the costs."""
PARTS = 4
"""Parts in which a symmetric product is computed, to skip most of its mirrored half."""
DAMPING = 1e-2
"""Added to the diagonal of `G`, relative to its mean."""


def removal_costs(
    moments: Float[Tensor, "neurons neurons"],
    weight: Float[Tensor, "hidden neurons"],
    pulled: Float[Tensor, "hidden neurons"],
    *,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> Float[Tensor, "neurons"]:
    """Compute the cost of each neuron under greedy removal, cheapest first, with a refit after each block.

    Costs never decrease along the order, so the neurons with the highest costs are those that greedy removal keeps, at
    every width. Takes `2 * neurons ** 3` operations in float64, and twice the memory of `moments`.

    Args:
        moments: second moments of the activations, positive semidefinite.
        weight: weight of the output projection.
        pulled: curvature at its output, positive semidefinite, times `weight`.
        block: neurons removed at a time; 1 is exactly greedy.
        damping: relative to the mean of the diagonal of `moments`.
    """
    inverse, neurons = moments.double().clone(), len(moments)
    scale = inverse.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    inverse.diagonal().add_(damping * scale)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    weight, pulled = weight.detach().double(), pulled.double()
    costs, left = weight.new_zeros(neurons), torch.arange(neurons, device=weight.device)
    while len(left):
        now = (weight * pulled).sum(0).clamp(min=0) / inverse.diagonal()
        gone = now.argsort(stable=True)[:block]
        costs[left[gone]] = now[gone].clamp(min=float(costs.max()))
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, gone, value=False)
        taken = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])
        weight = weight[:, stays] - weight[:, gone] @ taken
        pulled = pulled[:, stays] - pulled[:, gone] @ taken
        inverse = inverse[stays][:, stays] - inverse[stays][:, gone] @ taken
        left = left[stays]
    return costs


def gram(rows: Float[Tensor, "tokens columns"]) -> Float[Tensor, "columns columns"]:
    """Compute `rows.T @ rows` with little more than half of the operations."""
    parts = rows.tensor_split(PARTS, 1)
    product = rows.new_empty(rows.shape[1], rows.shape[1])
    start = 0
    for part in parts:
        end = start + part.shape[1]
        torch.mm(part.T, rows[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
        start = end
    return product
