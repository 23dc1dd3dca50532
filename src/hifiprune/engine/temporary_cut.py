"""Cut a model temporarily; afterwards every weight is restored, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from hifiprune.engine.offload import offload_of
from hifiprune.models.edit import _put_back_, cuts_of, keep_, matching_mlps, others, state_widths
from hifiprune.models.mlp import group_by_parameters
from hifiprune.models.neuron_slices import parameter_slices
from hifiprune.plan import Plan


@contextmanager
def cut(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Cut `model` as `cut_` does within this context; afterwards every weight is restored, bit for bit.

    Only the removed rows and columns are saved, so there is never a second copy of the weights. Parameters stay the
    same objects, for optimizers that hold them, also if an error or an interruption ends the cutting itself.

    Raises:
        UserError: the plan was made for a model of another shape.
    """
    mlps = matching_mlps(model, plan)
    rests = [others(kept, mlp.neurons) for mlp, kept in zip(mlps, plan.kept, strict=True)]
    groups = list(group_by_parameters(mlps))
    removed = [[part.of(rests[own], group[0].neurons) for part in parameter_slices(group[0])] for own, group in groups]
    try:
        with torch.no_grad():
            keep_(mlps, plan.kept)
        state_widths(model, plan.widths)
        if shelf := offload_of(model):
            shelf.cuts.update(cuts_of(model, plan))
        yield
    finally:
        with torch.no_grad():
            for (own, group), gone in zip(groups, removed, strict=True):
                _put_back_(group[0], plan.kept[own], rests[own], gone)
        state_widths(model, plan.neurons)
        if shelf := offload_of(model):
            shelf.cuts.clear()
