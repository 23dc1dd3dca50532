"""Where the MLP neurons of a model are.

A layout is data plus a structural check: a row of `FAMILIES` says where an architecture keeps its decoder blocks and
the linear maps of their MLPs, and `find_mlps` proves on the model at hand that the maps fit together as neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hifiprune.errors import UserError, nearest_name


@dataclass(frozen=True)
class Family:
    """Paths of the modules that pruning needs; those of the MLP are relative to a block, those of its maps to itself.

    Attributes:
        blocks: the decoder blocks.
        norm: the last norm, after them.
        mlp: of a block; empty where its maps lie in the block itself.
        inputs: the maps that neurons read through; one that holds the rows of the gate and then those of the other
            is named twice.
        output: the map that neurons write through.
        width: name of the MLPs' width in the configuration; there and in it may be nothing, which means four times
            the hidden size.
        additive: whether what it writes is added to the residual stream as it is, without a norm or factor between.
        tuples: whether blocks give a tuple, whose first item is the hidden state.
        stored: how a name in the model begins and how it does in files, where they differ.
        packs: whether blocks keep examples in one row apart by their positions.
        models: well-known models of the architecture.
    """

    blocks: str = "model.layers"
    norm: str = "model.norm"
    mlp: str = "mlp"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    width: str = "intermediate_size"
    additive: bool = True
    tuples: bool = False
    stored: tuple[str, str] = ("", "")
    packs: bool = True
    models: str = ""

    @property
    def maps(self) -> list[str]:
        """Paths in the model of the MLP's maps, the output map last, with a place for the block's number."""
        names = [*dict.fromkeys(self.inputs), self.output]
        return [".".join(filter(None, (self.blocks, "{}", self.mlp, name))) for name in names]

    def in_model(self, name: str) -> str:
        """What a tensor of a file is called in the model."""
        ours, theirs = self.stored
        return ours + name.removeprefix(theirs) if theirs and name.startswith(theirs) else name

    def in_files(self, name: str) -> str:
        """What a tensor of the model is called in files."""
        ours, theirs = self.stored
        return theirs + name.removeprefix(ours) if ours and name.startswith(ours) else name


FUSED = ("gate_up_proj", "gate_up_proj")
GPT = Family("transformer.h", "transformer.ln_f", width="n_inner")
ALIBI = replace(GPT, inputs=("dense_h_to_4h",), output="dense_4h_to_h", tuples=True, packs=False)
FAMILIES: dict[str, Family] = {
    "arcee": Family(inputs=("up_proj",), models="Arcee AFM"),
    "bloom": replace(
        GPT, inputs=("dense_h_to_4h",), output="dense_4h_to_h", width="", tuples=True, packs=False, models="BLOOM"
    ),
    "codegen": replace(GPT, inputs=("fc_in",), output="fc_out", tuples=True, models="CodeGen"),
    "cohere": Family(models="Command R, Aya"),
    "cohere2": Family(models="Command A, Command R7B"),
    "ernie4_5": Family(models="ERNIE 4.5 (dense)"),
    "exaone4": Family(additive=False, models="EXAONE 4"),
    "falcon": replace(ALIBI, width="ffn_hidden_size", models="Falcon"),
    "gemma": Family(models="Gemma"),
    "gemma2": Family(additive=False, models="Gemma 2"),
    "gemma3_text": Family(additive=False, models="Gemma 3 (text)"),
    "glm": Family(inputs=FUSED, models="GLM-4 9B"),
    "glm4": Family(inputs=FUSED, additive=False, models="GLM-4-0414"),
    "gpt2": replace(GPT, inputs=("c_fc",), output="c_proj", models="GPT-2, DistilGPT-2"),
    "gpt_bigcode": replace(GPT, inputs=("c_fc",), output="c_proj", models="StarCoder"),
    "gpt_neox": Family(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        inputs=("dense_h_to_4h",),
        output="dense_4h_to_h",
        stored=("lm_head.", "embed_out."),
        models="GPT-NeoX, Pythia",
    ),
    "gptj": replace(GPT, inputs=("fc_in",), output="fc_out", tuples=True, models="GPT-J"),
    "granite": Family(additive=False, models="Granite 3 (dense)"),
    "helium": Family(models="Helium"),
    "hunyuan_v1_dense": Family(models="Hunyuan (dense)"),
    "llama": Family(models="Llama 1 to 3, SmolLM, SmolLM2, Yi, DeepSeek LLM"),
    "ministral": Family(models="Ministral"),
    "ministral3": Family(models="Ministral 3 (text)"),
    "mistral": Family(models="Mistral 7B, Mistral Nemo, Mistral Small (text)"),
    "nemotron": Family(inputs=("up_proj",), models="Nemotron 4, Minitron"),
    "olmo": Family(models="OLMo"),
    "olmo2": Family(additive=False, models="OLMo 2"),
    "olmo3": Family(additive=False, models="OLMo 3"),
    "opt": Family(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "",
        inputs=("fc1",),
        output="fc2",
        width="ffn_dim",
        packs=False,
        models="OPT",
    ),
    "phi": Family(norm="model.final_layernorm", inputs=("fc1",), output="fc2", models="Phi-1, Phi-1.5, Phi-2"),
    "phi3": Family(inputs=FUSED, models="Phi-3, Phi-4"),
    "qwen2": Family(models="Qwen 2, Qwen 2.5"),
    "qwen3": Family(models="Qwen 3"),
    "seed_oss": Family(models="Seed-OSS"),
    "smollm3": Family(models="SmolLM3"),
    "stablelm": Family(models="StableLM"),
    "starcoder2": Family(inputs=("c_fc",), output="c_proj", models="StarCoder2"),
}


@dataclass(frozen=True)
class LinearMap:
    """A linear map of an MLP, by itself or as a part of a module that holds several, one after the other.

    Attributes:
        name: path of the module in the model.
        module: a `Linear`, or a `Conv1D`, which keeps its weight the other way round.
        part: which of the equal parts of its outputs.
        parts: how many there are.
    """

    name: str
    module: nn.Module
    part: int = 0
    parts: int = 1

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """Of the map, in the module's own memory."""
        weight = cast(Tensor, self.module.weight)
        return self._own(weight.T if self.flipped else weight)

    @property
    def bias(self) -> Float[Tensor, "outputs"] | None:
        """Likewise, if there is one."""
        bias = cast(Tensor | None, self.module.bias)
        return bias if bias is None else self._own(bias)

    def _own(self, values: Tensor) -> Tensor:
        return values if self.parts == 1 else values.chunk(self.parts)[self.part]

    @property
    def flipped(self) -> bool:
        """Whether the module's weight is `[inputs, outputs]`."""
        return isinstance(self.module, Conv1D)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return len(self.weight)

    def __call__(self, values: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """What the map makes of its input."""
        return functional.linear(values, self.weight, self.bias)


@dataclass(frozen=True)
class Mlp:
    """The neurons of one decoder block: neuron `i` is row `i` of every input map and column `i` of the output map.

    Attributes:
        name: path of the MLP in the model, such as `model.layers.0.mlp`.
        inputs: the maps that neurons read through, weights `[neurons, hidden]` (gate and up).
        output: the map that neurons write through, weight `[hidden, neurons]`; its input is the activation `h`.
    """

    name: str
    inputs: tuple[LinearMap, ...]
    output: LinearMap

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """All of them, the output map last."""
        return *self.inputs, self.output

    @property
    def neurons(self) -> int:
        """The width of the MLP, its intermediate size."""
        return self.output.in_features

    @property
    def parameters_per_neuron(self) -> int:
        """Parameters that go with each neuron removed."""
        rows = sum(each.in_features + (each.bias is not None) for each in self.inputs)
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
    stated = getattr(config, "mlp_widths", None) or [width_of(config)] * len(mlps)
    for mlp, width in zip(mlps, stated, strict=True):
        if mlp.neurons != width:
            raise UserError(f"{mlp.name} has {mlp.neurons} neurons but the configuration says {width}")
    return mlps


def width_of(config: PretrainedConfig) -> int:
    """How wide a configuration says that MLPs are, or the widest."""
    name = family_of(config.model_type).width
    stated: int | None = getattr(config, name) if name else None
    return int(max(getattr(config, "mlp_widths", None) or [stated or 4 * config.hidden_size]))


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks.

    Raises:
        UserError: the architecture is not supported, or `model` is not its causal language model.
    """
    blocks = _module_of(model, family_of(model.config.model_type, [type(model).__name__]).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def find_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after the last block.

    Raises:
        UserError: there is none, as in some variants of a supported architecture.
    """
    return _module_of(model, family_of(model.config.model_type).norm)


def _module_of(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} has no {path}; give the causal language model, if it is not a variant of the "
            "architecture that is not supported"
        ) from error


def _checked_mlp(module: nn.Module, family: Family, layer: int) -> Mlp:
    name = ".".join(filter(None, (family.blocks, str(layer), family.mlp)))
    *inputs, output = (_checked_map(module, name, each, family.inputs) for each in (*family.inputs, family.output))
    maps = [replace(each, part=family.inputs[:place].count(family.inputs[place])) for place, each in enumerate(inputs)]
    widths = {each.out_features for each in maps} | {output.in_features}
    ours = {id(parameter) for each in (*inputs, output) for parameter in each.module.parameters()}
    strangers = [key for key, parameter in module.named_parameters() if id(parameter) not in ours and family.mlp]
    if len(widths) != 1 or strangers:
        raise UserError(f"{name} is not an MLP of one width: widths {sorted(widths)}, other parameters {strangers}")
    return Mlp(name, tuple(maps), output)


def _checked_map(mlp: nn.Module, name: str, attribute: str, inputs: Sequence[str]) -> LinearMap:
    module = getattr(mlp, attribute, None)
    plain = type(module) in (nn.Linear, Conv1D, FalconLinear)
    if module is None or not plain or not torch.is_floating_point(module.weight):
        kind = "missing" if module is None else f"a {type(module).__name__}"
        raise UserError(
            f"{name}.{attribute} is {kind}, not a plain floating-point Linear; "
            "prune the original checkpoint, before quantization and with adapters merged"
        )
    return LinearMap(f"{name}.{attribute}", module, parts=max(1, inputs.count(attribute)))


def count_parameters(model: PreTrainedModel) -> int:
    """Total parameters, with tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
