"""Where the MLP neurons of a model are.

A layout is data plus a structural check: a row of `FAMILIES` says where an architecture keeps its decoder blocks and
the linear maps of their MLPs, and `find_mlps` proves on the model at hand that the maps fit together as neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hifiprune.errors import UserError, nearest_name


@dataclass(frozen=True)
class Family:
    """Paths of the modules that pruning needs; those of the MLP are relative to a block, those of its maps to itself.

    `additive` says that its output is added to the residual stream as it is, without a norm between.
    """

    blocks: str = "model.layers"
    norm: str = "model.norm"
    mlp: str = "mlp"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    additive: bool = True


FAMILIES: dict[str, Family] = {
    "gemma2": Family(additive=False),
    "gemma3_text": Family(additive=False),
    "llama": Family(),  # also SmolLM and SmolLM2
    "mistral": Family(),
    "olmo2": Family(additive=False),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
}


@dataclass(frozen=True)
class Mlp:
    """The neurons of one decoder block: neuron `i` is row `i` of every input map and column `i` of the output map.

    Attributes:
        name: path of the MLP in the model, such as `model.layers.0.mlp`.
        inputs: the maps that neurons read through, weights `[neurons, hidden]` (gate and up).
        output: the map that neurons write through, weight `[hidden, neurons]`; its input is the activation `h`.
    """

    name: str
    inputs: tuple[nn.Linear, ...]
    output: nn.Linear

    @property
    def neurons(self) -> int:
        """The width of the MLP, its intermediate size."""
        return self.output.in_features

    @property
    def parameters_per_neuron(self) -> int:
        """Parameters that go with each neuron removed."""
        rows = sum(linear.in_features + (linear.bias is not None) for linear in self.inputs)
        return rows + self.output.out_features


def family_of(model_type: str, architectures: Sequence[str] | None = None) -> Family:
    """Return the layout of an architecture, or refuse it by name.

    Raises:
        UserError: the model type is not supported.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    found = f" ({', '.join(architectures)})" if architectures else ""
    raise UserError(
        f"model type '{model_type}'{found} is not supported; "
        f"supported are {', '.join(sorted(FAMILIES))}{nearest_name(model_type, FAMILIES)}"
    )


def find_mlps(model: PreTrainedModel) -> list[Mlp]:
    """Return the MLPs of `model` in layer order, after checking that each one is what its layout says.

    Works on the meta device as well.

    Raises:
        UserError: the architecture is not supported, or a module is not a plain linear map of the expected shape, as
            with quantized weights or adapters that were not merged.
    """
    family = family_of(model.config.model_type, [type(model).__name__])
    blocks = find_blocks(model)
    mlps = [_checked_mlp(block.get_submodule(family.mlp), family, i) for i, block in enumerate(blocks)]
    config = model.config.get_text_config()
    stated = getattr(config, "mlp_widths", None) or [config.intermediate_size] * len(mlps)
    for mlp, width in zip(mlps, stated, strict=True):
        if mlp.neurons != width:
            raise UserError(f"{mlp.name} has {mlp.neurons} neurons but the configuration says {width}")
    return mlps


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks.

    Raises:
        UserError: the architecture is not supported, or `model` is not its causal language model.
    """
    family = family_of(model.config.model_type, [type(model).__name__])
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise UserError(f"{type(model).__name__} has no {family.blocks}; give the causal language model") from error
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _checked_mlp(module: nn.Module, family: Family, layer: int) -> Mlp:
    name = f"{family.blocks}.{layer}.{family.mlp}"
    linears: list[nn.Linear] = []
    for attribute in (*family.inputs, family.output):
        linear = getattr(module, attribute, None)
        if type(linear) is not nn.Linear or not torch.is_floating_point(linear.weight):
            kind = "missing" if linear is None else f"a {type(linear).__name__}"
            raise UserError(
                f"{name}.{attribute} is {kind}, not a plain floating-point Linear; "
                "prune the original checkpoint, before quantization and with adapters merged"
            )
        linears.append(linear)
    *inputs, output = linears
    widths = {linear.out_features for linear in inputs} | {output.in_features}
    ours = {id(parameter) for linear in linears for parameter in linear.parameters()}
    strangers = [key for key, parameter in module.named_parameters() if id(parameter) not in ours]
    if len(widths) != 1 or strangers:
        raise UserError(
            f"{name} is not a gated MLP of one width: widths {sorted(widths)}, other parameters {strangers}"
        )
    return Mlp(name, tuple(inputs), output)


def count_parameters(model: PreTrainedModel) -> int:
    """Total parameters, with tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
