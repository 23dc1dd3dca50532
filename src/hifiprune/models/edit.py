"""Edit the MLPs of a model in memory: keep some neurons, restore removed ones, and state the widths."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.errors import UserError
from hifiprune.models.detect import family_of
from hifiprune.models.mlp import Mlp, find_mlps, group_by_parameters, locate_mlps, stated_width
from hifiprune.models.modeling_pruned import pruned_class
from hifiprune.models.neuron_slices import Places, parameter_slices
from hifiprune.models.unsupported import refuse_altered
from hifiprune.plan import Plan


def others(kept: Int[Tensor, "kept"], neurons: int) -> Int[Tensor, "rest"]:
    """Return the indices of the neurons that are not kept, on the device of `kept`."""
    mask = torch.ones(neurons, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero()[:, 0]


def matching_mlps(model: PreTrainedModel, plan: Plan) -> list[Mlp]:
    """Return the MLPs of `model`, after checking that `plan` fits it.

    Raises:
        UserError: it was made for a model of another shape, or the model holds adapters or quantized weights.
    """
    refuse_altered(model)
    mlps = find_mlps(model)
    found = [(mlp.name, mlp.neurons) for mlp in mlps]
    planned = list(zip(plan.names, plan.neurons, strict=True))
    if found != planned:
        raise UserError(
            f"the plan is for {len(planned)} MLPs of {sorted(set(plan.neurons))} neurons, "
            f"the model has {len(found)} of {sorted({neurons for _, neurons in found})}"
        )
    return mlps


def cuts_of(model: PreTrainedModel, plan: Plan) -> dict[str, Places]:
    """Return the slice that is kept of every tensor that a cut changes, by the tensor's name."""
    return {
        f"{part.linear.name}.{part.name}": part.places(plan.kept[own], plan.neurons[own.start])
        for own, group in group_by_parameters(find_mlps(model))
        for part in parameter_slices(group[0])
    }


def keep_(mlps: Sequence[Mlp], kept: Sequence[Int[Tensor, "_"]]) -> None:
    """Remove all neurons but those in `kept`, from all experts of a block at once.

    Raises:
        UserError: experts would differ in width.
    """
    for own, (first, *_) in group_by_parameters(mlps):
        widths = {len(each) for each in kept[own]}
        if len(widths) > 1:
            raise UserError(
                f"the experts of {first.output.name} are to keep {sorted(widths)} neurons; "
                "one configuration holds one width for all of them"
            )
        neurons = first.neurons
        for part in parameter_slices(first):
            part.set_(part.of(kept[own], neurons))
        state_sizes(first)


def forget_gradients_(mlps: Sequence[Mlp]) -> None:
    """Drop gradients, which still have the shape before the cut."""
    for _, (first, *_) in group_by_parameters(mlps):
        for part in parameter_slices(first):
            part.parameter.grad = None


def _put_back_(
    mlp: Mlp, kept: Sequence[Int[Tensor, "kept"]], rest: Sequence[Int[Tensor, "rest"]], removed: list[Tensor]
) -> None:
    neurons = len(kept[0]) + len(rest[0])
    for part, gone in zip(parameter_slices(mlp), removed, strict=True):
        present = part.parameter
        places = [part.places(chosen, neurons) for chosen in (kept, rest)]
        size = places[0].shape(present.shape, neurons * part.linear.parts)
        if list(present.shape) == size:
            continue  # it was not cut, or nothing of it
        whole = present.detach().new_empty(size)
        for place, values in zip(places, (present, gone), strict=True):
            sources = [*values] if place.stacked else [values]
            for (matrix, rows), source in zip(place.matrices(whole), sources, strict=True):
                matrix.index_copy_(place.dim, rows, source.detach())
        part.set_(whole)
    state_sizes(mlp)


def state_sizes(mlp: Mlp) -> None:
    """Update the size attributes of an MLP's modules."""
    for each in mlp.projections:
        module: Any = each.module
        if mlp.is_expert:
            module.intermediate_dim = mlp.neurons
        elif each.flipped:
            module.nx, module.nf = module.weight.shape
        else:
            module.out_features, module.in_features = module.weight.shape


def state_widths(model: PreTrainedModel, widths: Sequence[int], *, mixed: bool = False) -> None:
    """Write the MLP widths into the configuration; a model of several widths gets a class that reads them from there.

    A stock configuration holds one width for all layers, so a model of several widths is saved with its own code; so is
    any if `mixed`.

    Raises:
        UserError: they differ where one width must be stated for all, as with experts.
    """
    mlps = locate_mlps(model)
    stated = {mlp.stated[0]: 0 for mlp in mlps if len(mlp.stated) == 1}
    for mlp, width in zip(mlps, widths, strict=True):
        if len(mlp.stated) == 1:
            stated[mlp.stated[0]] = max(stated[mlp.stated[0]], width)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, width in stated.items():
            if hasattr(config, name):
                setattr(config, name, width)
        for name in ("mlp_widths", "mlp_maps"):
            config.__dict__.pop(name, None)
        if getattr(config, "auto_map", {}).get("AutoModelForCausalLM", "").startswith("modeling_pruned."):
            del config.auto_map
    config = model.config.get_text_config()
    mixed = mixed or any(stated_width(config, mlp.stated) != width for mlp, width in zip(mlps, widths, strict=True))
    family = family_of(model.config)
    if mixed and family.one_width_reason:
        raise UserError(f"MLPs of {sorted({*widths})} neurons cannot be saved together: {family.one_width_reason}")
    if mixed:
        model.config.mlp_widths, model.config.mlp_maps = list(widths), family.projections
    model.__class__ = pruned_class(type(model), mixed=mixed)
