"""Cut neurons out of a model in memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.engine.lm_head import at_least_float32
from hifiprune.errors import UserError
from hifiprune.models.edit import forget_gradients_, keep_, matching_mlps, others, state_widths
from hifiprune.models.mlp import Mlp
from hifiprune.plan import Plan


@torch.no_grad()
def cut_(model: PreTrainedModel, plan: Plan, means: Sequence[Float[Tensor, "_"]] | None = None) -> None:
    """Remove from `model` every neuron that `plan` does not keep, in the weights' own dtype.

    The result computes what the dense model computes with the activations of the removed neurons set to zero, or to
    their `means`, which then go into the bias of the output projection (arXiv 2312.11983). The widths are
    updated wherever the configuration states them, so the saved model loads without this library.

    Args:
        model: the dense model.
        plan: which neurons to keep.
        means: mean activation of every neuron of each MLP, to compensate with.

    Raises:
        UserError: the plan was made for a model of another shape, or there is no bias to compensate with.
    """
    mlps = matching_mlps(model, plan)
    if means is not None:
        require_bias(mlps)
        for mlp, kept, mean in zip(mlps, plan.kept, means, strict=True):
            _compensate_(mlp, others(kept, mlp.neurons), mean)
    keep_(mlps, plan.kept)
    forget_gradients_(mlps)
    state_widths(model, plan.widths)


def require_bias(mlps: Sequence[Mlp]) -> None:
    """Refuse MLPs whose output projection has no bias.

    Raises:
        UserError: one has none.
    """
    for mlp in mlps:
        if mlp.output.bias is None:
            raise UserError(
                f"the output projection of {mlp.name} has no bias to compensate with; leave --bias-compensation out"
            )


def _compensate_(mlp: Mlp, removed: Int[Tensor, "removed"], means: Float[Tensor, "neurons"]) -> None:
    weight, bias = at_least_float32(mlp.output.weight), mlp.output.bias
    assert bias is not None
    removed = removed.to(weight.device)
    bias.copy_(at_least_float32(bias) + weight[:, removed] @ means.to(weight)[removed])
