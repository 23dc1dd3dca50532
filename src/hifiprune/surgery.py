"""Cutting neurons out of a model in memory."""

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.errors import UserError
from hifiprune.neurons import find_mlps
from hifiprune.plan import Plan


@torch.no_grad()
def cut_(model: PreTrainedModel, plan: Plan) -> None:
    """Remove from `model` every neuron that `plan` does not keep, in the weights' own dtype.

    The result computes what the dense model computes with the activations of the removed neurons set to zero. The
    intermediate size is updated wherever the configuration states it, so the saved model loads without code of ours.

    Raises:
        UserError: the plan was made for a model of another shape.
    """
    mlps = find_mlps(model)
    found = [(mlp.name, mlp.neurons) for mlp in mlps]
    planned = list(zip(plan.names, plan.neurons, strict=True))
    if found != planned:
        raise UserError(
            f"the plan is for {len(planned)} MLPs of {sorted(set(plan.neurons))} neurons, "
            f"the model has {len(found)} of {sorted({neurons for _, neurons in found})}"
        )
    widths = set(plan.widths)
    if len(widths) != 1:
        raise UserError(f"the plan's widths differ ({sorted(widths)}); a stock configuration holds one for all")
    for mlp, kept in zip(mlps, plan.kept, strict=True):
        for linear in mlp.inputs:
            _keep_rows_(linear, kept)
        _keep_columns_(mlp.output, kept)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "intermediate_size"):
            config.intermediate_size = plan.widths[0]


def _keep_rows_(linear: nn.Linear, kept: Int[Tensor, "kept"]) -> None:
    kept = kept.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight[kept], requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[kept], requires_grad=linear.bias.requires_grad)
    linear.out_features = len(kept)


def _keep_columns_(linear: nn.Linear, kept: Int[Tensor, "kept"]) -> None:
    kept = kept.to(linear.weight.device)
    columns = linear.weight[:, kept].contiguous()
    linear.weight = nn.Parameter(columns, requires_grad=linear.weight.requires_grad)
    linear.in_features = len(kept)
