"""Second-order selection that knows about the repair: what is lost when a neuron goes and the others take over.

With activations `h` and the output map `W`, removing neurons and refitting the others by least squares changes the
MLP's output by `W h - W' h_K`. Its cost is measured in the metric of the KL divergence there, the covariance `F` of the
gradient of the log-likelihood of the model's own labels, taken as independent of `h` (Kronecker-factored curvature,
arXiv 1503.05671). For one neuron the least cost has a closed form, that of the optimal brain surgeon:
`(w_i^T F w_i) / [G^-1]_ii` with `G = E[h h^T]`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 8
"""Neurons that are removed between two looks at the costs."""
DAMPING = 1e-2
"""Added to the diagonal of `G`, relative to its mean."""


def removal_costs(
    gram: Float[Tensor, "neurons neurons"],
    weight: Float[Tensor, "hidden neurons"],
    metric: Float[Tensor, "hidden hidden"],
    *,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> Float[Tensor, "neurons"]:
    """Cost of each neuron when it goes in greedy order, cheapest first, the others refitted after each block.

    Costs never fall along the order, so the neurons with the highest ones are those that greedy removal would keep, at
    every width. Takes `2 * neurons ** 3` operations in float64, and twice the memory of `gram` in it.

    Args:
        gram: second moments of the activations, positive semidefinite.
        weight: of the output map.
        metric: curvature at its output, positive semidefinite.
        block: neurons removed at a time; 1 is exactly greedy.
        damping: relative to the mean of the diagonal of `gram`.
    """
    inverse, neurons = gram.double().clone(), len(gram)
    scale = inverse.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    inverse.diagonal().add_(damping * scale)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    weight = weight.detach().double().clone()
    pulled = metric.double() @ weight
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
