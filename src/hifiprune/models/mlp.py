"""Find the MLP neurons of a model.

A layout is data plus a structural check: a row of `FAMILIES` says where an architecture keeps its decoder blocks and
the projections of their MLPs, and `find_mlps` verifies that those of a given model fit together as neurons. A block has
one MLP, or several: its experts, each an MLP of its own, and the shared ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hifiprune.errors import UserError
from hifiprune.models.detect import family_of
from hifiprune.models.families import Family

STACKED = ("gate_up_proj", "down_proj")
"""Parameters that stack the projections of all experts of a block, by their names in transformers."""


@dataclass(frozen=True)
class Projection:
    """A projection (linear map) of an MLP: a module of its own, or a slice of a parameter that holds several.

    Attributes:
        name: path of the module in the model.
        module: a `Linear`; a `Conv1D`, whose weight is transposed; or a module that holds stacked experts.
        part: index of this projection among the equal parts of the module's outputs.
        parts: number of parts.
        weight_name: name of the parameter in the module.
        expert: index of the expert in the stack; None without a stack.
    """

    name: str
    module: nn.Module
    part: int = 0
    parts: int = 1
    weight_name: str = "weight"
    expert: int | None = None

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """Return a view of the projection's weight."""
        weight: Tensor = getattr(self.module, self.weight_name)
        if self.expert is not None:
            weight = weight[self.expert]
        return self._own(weight.T if self.flipped else weight)

    @property
    def bias(self) -> Float[Tensor, "outputs"] | None:
        """Return a view of the projection's bias, None without one."""
        bias = None if self.expert is not None else cast(Tensor | None, self.module.bias)
        return bias if bias is None else self._own(bias)

    def _own(self, values: Tensor) -> Tensor:
        return values if self.parts == 1 else values.chunk(self.parts)[self.part]

    @property
    def flipped(self) -> bool:
        """Return whether the module's weight is `[inputs, outputs]`."""
        return isinstance(self.module, Conv1D)

    @property
    def in_features(self) -> int:
        """Return the number of inputs."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Return the number of outputs."""
        return len(self.weight)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that hold the projection, by name; they stay the same objects when neurons are cut."""
        names = (self.weight_name, *(("bias",) if self.bias is not None else ()))
        return {f"{self.name}.{name}": getattr(self.module, name) for name in names}

    def state(self) -> dict[str, Tensor]:
        """Return the current values of the projection's parameters, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def __call__(self, values: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Apply the projection."""
        return functional.linear(values, self.weight, self.bias)


@dataclass(frozen=True)
class Mlp:
    """An MLP of a decoder block: neuron `i` is row `i` of every input projection and column `i` of the output one.

    Attributes:
        name: path of the MLP in the model, such as `model.layers.0.mlp`.
        inputs: input projections (gate and up), weights `[neurons, hidden]`.
        output: output projection (down), weight `[hidden, neurons]`; its input is the activation `h`,
            for an expert multiplied by its routing weight.
        block: index of the decoder block.
        stated: configuration keys whose product is the width.
    """

    name: str
    inputs: tuple[Projection, ...]
    output: Projection
    block: int = 0
    stated: tuple[str, ...] = ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Return all projections, the output projection last."""
        return *self.inputs, self.output

    @property
    def is_expert(self) -> bool:
        """Return whether the MLP is an expert, which sees only the tokens routed to it."""
        return self.output.expert is not None

    @property
    def neurons(self) -> int:
        """Return the width of the MLP (intermediate size)."""
        return self.output.in_features

    @property
    def parameters_per_neuron(self) -> int:
        """Return the number of parameters removed with each neuron."""
        rows = sum(each.in_features + (each.bias is not None) for each in self.inputs)
        return rows + self.output.out_features


def find_mlps(model: PreTrainedModel) -> list[Mlp]:
    """Return the MLPs of `model` in the order of its blocks, after checking that each one is what its layout says.

    Works on the meta device as well.

    Raises:
        UserError: the architecture is not supported, or a module is not a plain projection of the expected shape, as
            with quantized weights or adapters that were not merged.
    """
    mlps = locate_mlps(model)
    config = model.config.get_text_config()
    mixed = getattr(config, "mlp_widths", None)
    for mlp, width in zip(mlps, mixed or [stated_width(config, mlp.stated) for mlp in mlps], strict=True):
        if mlp.neurons != width:
            raise UserError(f"{mlp.name} has {mlp.neurons} neurons but the configuration says {width}")
    return mlps


def locate_mlps(model: PreTrainedModel) -> list[Mlp]:
    """Return the MLPs of `model` without checking their widths against the configuration."""
    family = family_of(model.config)
    return [
        mlp for index, block in enumerate(find_blocks(model)) for mlp in _mlps_of(block, _path(family, index), family)
    ]


def group_by_parameters(mlps: Sequence[Mlp]) -> Iterator[tuple[slice, list[Mlp]]]:
    """Group MLPs that share their parameters: the experts of a block, or one MLP alone; yield indices and MLPs."""
    start = 0
    for _, group in groupby(mlps, key=lambda mlp: id(mlp.output.module)):
        found = list(group)
        yield slice(start, start := start + len(found)), found


def by_block(mlps: Sequence[Mlp]) -> list[range]:
    """Return the range of MLP indices of each block."""
    found = []
    for _, group in groupby(range(len(mlps)), key=lambda number: mlps[number].block):
        numbers = list(group)
        found.append(range(numbers[0], numbers[-1] + 1))
    return found


def stated_width(config: PretrainedConfig, names: Sequence[str]) -> int:
    """Return the product of some keys of a text configuration; four times the hidden size where they are not set."""
    stated = [getattr(config, name) or 4 * config.hidden_size for name in names]
    return int(prod(stated) if stated else 4 * config.hidden_size)


def width_of(config: PretrainedConfig) -> int:
    """Return the MLP width that a configuration states, or the largest; for experts the total that a token uses."""
    family, text = family_of(config), config.get_text_config()
    if mixed := getattr(text, "mlp_widths", None):
        return int(max(mixed))
    if not family.experts:
        return stated_width(text, (family.width,) * bool(family.width))
    shared = stated_width(text, family.shared_width) if family.shared else 0
    return int(text.num_experts_per_tok * stated_width(text, (family.expert_width,)) + shared)


def seen_mlps(config: PretrainedConfig) -> int:
    """Return the number of MLPs of a block that process a token."""
    family = family_of(config)
    return int(config.get_text_config().num_experts_per_tok) + bool(family.shared) if family.experts else 1


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks.

    Raises:
        UserError: the architecture is not supported, or `model` is not its causal language model.
    """
    blocks = _module_of(model, family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def find_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after the last block.

    Raises:
        UserError: there is none, as in some variants of a supported architecture.
    """
    return _module_of(model, family_of(model.config).norm)


def _module_of(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} has no {path}; give the causal language model, if it is not a variant of the "
            "architecture that is not supported"
        ) from error


def _path(family: Family, index: int) -> str:
    return ".".join(filter(None, (family.blocks, str(index), family.mlp)))


def _mlps_of(block: nn.Module, name: str, family: Family) -> Iterator[Mlp]:
    """Yield the MLPs of a block: a plain one, or experts and the shared MLP."""
    module, index = block.get_submodule(family.mlp), int(name.removeprefix(f"{family.blocks}.").split(".")[0])
    experts: Any = getattr(module, family.experts, None) if family.experts else None
    if experts is None:
        yield replace(_checked_mlp(module, name, family), block=index, stated=(family.width,) * bool(family.width))
        return
    for mlp in _checked_experts(experts, f"{name}.{family.experts}"):
        yield replace(mlp, block=index, stated=(family.expert_width,))
    if (shared := getattr(module, family.shared, None) if family.shared else None) is not None:
        found = _checked_mlp(shared, f"{name}.{family.shared}", family)
        yield replace(found, block=index, stated=family.shared_width)


def _checked_mlp(module: nn.Module, name: str, family: Family) -> Mlp:
    *inputs, output = (_checked_map(module, name, each, family.inputs) for each in (*family.inputs, family.output))
    projections = [
        replace(each, part=family.inputs[:place].count(family.inputs[place])) for place, each in enumerate(inputs)
    ]
    widths = {each.out_features for each in projections} | {output.in_features}
    ours = {id(parameter) for each in (*inputs, output) for parameter in each.module.parameters()}
    others = ((key, each) for key, each in module.named_parameters() if id(each) not in ours and family.mlp)
    strangers = [key for key, each in others if each.numel() > 1]  # a number that all neurons share is none
    if len(widths) != 1 or strangers:
        raise UserError(f"{name} is not an MLP of one width: widths {sorted(widths)}, other parameters {strangers}")
    return Mlp(name, tuple(projections), output)


def _checked_map(mlp: nn.Module, name: str, attribute: str, inputs: Sequence[str]) -> Projection:
    module = getattr(mlp, attribute, None)
    plain = type(module) in (nn.Linear, Conv1D, FalconLinear)
    if module is None or not plain or not torch.is_floating_point(module.weight):
        kind = "missing" if module is None else f"a {type(module).__name__}"
        raise UserError(
            f"{name}.{attribute} is {kind}, not a plain floating-point Linear; "
            "prune the original checkpoint, before quantization and with adapters merged"
        )
    return Projection(f"{name}.{attribute}", module, parts=max(1, inputs.count(attribute)))


def _checked_experts(module: Any, name: str) -> list[Mlp]:
    """Return the experts of a module that stacks gate above up, `[experts, 2 * width, hidden]`, and down."""
    shapes = {key: tuple(values.shape) for key, values in module.named_parameters()}
    (both, down), hidden = (shapes.get(key, ()) for key in STACKED), getattr(module, "hidden_dim", 0)
    wanted = {
        STACKED[0]: (*both[:1], 2 * (down or (0,))[-1], hidden),
        STACKED[1]: (*both[:1], hidden, (down or (0,))[-1]),
    }
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    if shapes != wanted or not plain or not all(torch.is_floating_point(each) for each in module.parameters()):
        raise UserError(f"{name} does not stack plain experts with a gate: a {type(module).__name__} with {shapes}")
    found = []
    for expert in range(both[0]):
        first = Projection(name, module, 0, 2, STACKED[0], expert)
        output = Projection(name, module, weight_name=STACKED[1], expert=expert)
        found.append(Mlp(f"{name}.{expert}", (first, replace(first, part=1)), output))
    return found


def count_parameters(model: PreTrainedModel) -> int:
    """Count all parameters, tied weights once."""
    return sum(parameter.numel() for parameter in model.parameters())
