"""Cutting neurons out of a model in memory, for good or for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.errors import UserError
from hifiprune.head import precise
from hifiprune.modeling_pruned import pruned_class
from hifiprune.neurons import LinearMap, Mlp, family_of, find_mlps, width_of
from hifiprune.plan import Plan
from hifiprune.refusals import refuse_altered
from hifiprune.streaming import shelf_of


@torch.no_grad()
def cut_(model: PreTrainedModel, plan: Plan, means: Sequence[Float[Tensor, "_"]] | None = None) -> None:
    """Remove from `model` every neuron that `plan` does not keep, in the weights' own dtype.

    The result computes what the dense model computes with the activations of the removed neurons set to zero, or to
    their `means`, which then go into the bias of the output map (arXiv 2312.11983). The widths are
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
    for mlp, kept in zip(mlps, plan.kept, strict=True):
        keep_(mlp, kept)
    forget_gradients_(mlps)
    state_widths(model, plan.widths)


@contextmanager
def cut(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Have `model` cut as by `cut_` within; after, every weight is back, bit for bit.

    Only what is cut away is set aside, so there is never a second copy of the weights. The parameters stay the same
    objects, for optimizers that hold them, also when an error or an interruption ends the cutting itself.

    Raises:
        UserError: the plan was made for a model of another shape.
    """
    with put_back(model, plan):
        with torch.no_grad():
            for mlp, kept in zip(find_mlps(model), plan.kept, strict=True):
                keep_(mlp, kept)
        state_widths(model, plan.widths)
        if shelf := shelf_of(model):
            shelf.cuts.update(cuts_of(model, plan))
        yield


@contextmanager
def put_back(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Whatever of `model` is cut away within, as `plan` says, is set aside and back in its place after."""
    mlps = matching_mlps(model, plan)
    rests = [others(kept, mlp.neurons) for mlp, kept in zip(mlps, plan.kept, strict=True)]
    removed = [_taken(mlp, rest) for mlp, rest in zip(mlps, rests, strict=True)]
    try:
        yield
    finally:
        with torch.no_grad():
            for mlp, kept, rest, parts in zip(mlps, plan.kept, rests, removed, strict=True):
                _put_back_(mlp, kept, rest, parts)
        state_widths(model, plan.neurons)
        if shelf := shelf_of(model):
            shelf.cuts.clear()


def require_bias(mlps: Sequence[Mlp]) -> None:
    """Refuse MLPs whose output map has no bias.

    Raises:
        UserError: one has none.
    """
    for mlp in mlps:
        if mlp.output.bias is None:
            raise UserError(
                f"the output map of {mlp.name} has no bias to compensate with; leave --bias-compensation out"
            )


def _compensate_(mlp: Mlp, removed: Int[Tensor, "removed"], means: Float[Tensor, "neurons"]) -> None:
    weight, bias = precise(mlp.output.weight), mlp.output.bias
    assert bias is not None
    removed = removed.to(weight.device)
    bias.copy_(precise(bias) + weight[:, removed] @ means.to(weight)[removed])


def others(kept: Int[Tensor, "kept"], neurons: int) -> Int[Tensor, "rest"]:
    """The neurons that are not kept, where `kept` is."""
    mask = torch.ones(neurons, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero()[:, 0]


def _taken(mlp: Mlp, rest: Int[Tensor, "rest"]) -> list[Tensor]:
    return [part.of(rest, mlp.neurons) for part in parts_of(mlp)]


def matching_mlps(model: PreTrainedModel, plan: Plan) -> list[Mlp]:
    """The MLPs of `model`, for which `plan` must have been made.

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


@dataclass(frozen=True)
class Part:
    """A parameter that holds neurons.

    Attributes:
        linear: the map, or one of those that share a module.
        name: of the parameter in the module.
        dim: the dimension that counts neurons.
    """

    linear: LinearMap
    name: str
    dim: int

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now."""
        found: nn.Parameter = getattr(self.linear.module, self.name)
        return found

    def places(self, chosen: Int[Tensor, "chosen"], neurons: int) -> Int[Tensor, "places"]:
        """Where some of so many neurons are, in rising order."""
        return torch.cat([chosen + number * neurons for number in range(self.linear.parts)])

    def of(self, chosen: Int[Tensor, "chosen"], neurons: int) -> Tensor:
        """The values of some of so many neurons."""
        places = self.places(chosen, neurons).to(self.parameter.device)
        return self.parameter.detach().index_select(self.dim, places)

    def set_(self, values: Tensor) -> None:
        """Give it other values and another shape; it stays the same object, for whoever else holds it."""
        self.parameter.data = values.detach()


def parts_of(mlp: Mlp) -> Iterator[Part]:
    """Where the neurons of an MLP are, those of the output map last."""
    for linear in {each.module: each for each in mlp.inputs}.values():
        yield Part(linear, "weight", int(linear.flipped))
        if linear.bias is not None:
            yield Part(linear, "bias", 0)
    yield Part(mlp.output, "weight", int(not mlp.output.flipped))


def cuts_of(model: PreTrainedModel, plan: Plan) -> dict[str, tuple[Int[Tensor, "_"], int]]:
    """Of every tensor that a cut changes, by its name: what is kept of it, and in which dimension."""
    return {
        f"{part.linear.name}.{part.name}": (part.places(kept, neurons), part.dim)
        for mlp, kept, neurons in zip(find_mlps(model), plan.kept, plan.neurons, strict=True)
        for part in parts_of(mlp)
    }


def keep_(mlp: Mlp, kept: Int[Tensor, "kept"]) -> None:
    """Remove all other neurons from one MLP."""
    neurons = mlp.neurons
    for part in parts_of(mlp):
        part.set_(part.of(kept, neurons))
    _state_sizes(mlp)


def forget_gradients_(mlps: Sequence[Mlp]) -> None:
    """Leave no gradient of the shape before a cut."""
    for mlp in mlps:
        for part in parts_of(mlp):
            part.parameter.grad = None


def _put_back_(mlp: Mlp, kept: Int[Tensor, "kept"], rest: Int[Tensor, "rest"], removed: list[Tensor]) -> None:
    neurons = len(kept) + len(rest)
    for part, gone in zip(parts_of(mlp), removed, strict=True):
        present, size = part.parameter, list(part.parameter.shape)
        size[part.dim] = neurons * part.linear.parts
        if list(present.shape) == size:
            continue  # it was not cut, or nothing of it
        whole = present.detach().new_empty(size)
        for chosen, values in ((kept, present), (rest, gone)):
            whole.index_copy_(part.dim, part.places(chosen, neurons).to(whole.device), values)
        part.set_(whole)
    _state_sizes(mlp)


def _state_sizes(mlp: Mlp) -> None:
    """Have the modules say how large they are."""
    for each in mlp.maps:
        module: Any = each.module
        if each.flipped:
            module.nx, module.nf = module.weight.shape
        else:
            module.out_features, module.in_features = module.weight.shape


def state_widths(model: PreTrainedModel, widths: Sequence[int]) -> None:
    """Say in the configuration how wide the MLPs are; where they differ, the model becomes one that reads them there.

    A stock configuration holds one width for all layers, so models of several are saved with their own code.
    """
    family = family_of(model.config.model_type)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if family.width and hasattr(config, family.width):
            setattr(config, family.width, max(widths))
        for name in ("mlp_widths", "mlp_maps"):
            config.__dict__.pop(name, None)
        if getattr(config, "auto_map", {}).get("AutoModelForCausalLM", "").startswith("modeling_pruned."):
            del config.auto_map
    mixed = {*widths} != {width_of(model.config.get_text_config())}
    if mixed:
        model.config.mlp_widths, model.config.mlp_maps = list(widths), family.maps
    model.__class__ = pruned_class(type(model), mixed=mixed)
