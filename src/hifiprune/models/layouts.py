"""The layouts of an output: how a configuration states MLP widths, and so which libraries load it.

`stock` is the architecture's own, of one width; `deci` that of NVIDIA's Nemotron-NAS, Llama with a width for every
layer, which engines have an implementation of; `remote` states widths for a modeling file of ours, for any family.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hifiprune.config.groups import AUTO, DECI, REMOTE, STOCK
from hifiprune.errors import UserError
from hifiprune.models.configuration_deci import MULTIPLE, DeciConfig, width_of
from hifiprune.models.detect import family_of
from hifiprune.models.mlp import find_mlps
from hifiprune.models.modeling_deci import DeciLMForCausalLM, DeciModel

Facts = dict[str, Any]
CODE = ("configuration_deci.py", "modeling_deci.py", "modeling_pruned.py")
CLASSES = {"AutoConfig": DeciConfig, "AutoModel": DeciModel, "AutoModelForCausalLM": DeciLMForCausalLM}
OVERRIDES = ("per_layer_config", "allow_global_per_layer_attribute_access")
"""Keys by which transformers 5.14 and later states widths; without the second, reading the common width is an error."""
OF_FAMILIES = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
"""Keys of families that become Llama; none of them has a window."""
READ = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
"""Keys of Llama for which engines have other defaults."""


def settled_layout(asked: str, config: PretrainedConfig, widths: Sequence[int]) -> str:
    """Return the layout to write a model of these widths in.

    Raises:
        UserError: the layout that was asked for cannot hold it.
    """
    family = family_of(config)
    differ = not family.one_width_reason and (len({*widths}) > 1 or not family.width)
    if asked == AUTO:
        return STOCK if not differ else REMOTE if deci_obstacle(config, widths) else DECI
    if asked == STOCK and differ:
        raise UserError(
            f"layout stock holds one width for all layers, and these are {min(widths):,} to {max(widths):,} wide; "
            "use --layout auto, or --allocation uniform where the model is pruned"
        )
    if asked == REMOTE and family.one_width_reason:
        raise UserError(
            f"layout remote is not for a {config.model_type} model: {family.one_width_reason}; use --layout stock"
        )
    if asked == DECI and (obstacle := deci_obstacle(config, widths)):
        raise UserError(f"layout deci does not fit: {obstacle}; use --layout auto")
    return asked


def deci_obstacle(config: PretrainedConfig, widths: Sequence[int]) -> str:
    """Return why the layout deci cannot hold a model of these widths; empty if it can."""
    if config.model_type not in ("llama", "mistral", "qwen2"):
        return f"it is for Llama, Mistral and Qwen 2.5, and this is a {config.model_type} model"
    size, heads, window = config.hidden_size, config.num_attention_heads, getattr(config, "sliding_window", None)
    head = getattr(config, "head_dim", None) or size // heads
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    odd = next((width for width in widths if width % MULTIPLE), None)
    obstacles = {
        f"it has no sliding window, and this model has one of {window} tokens": window,
        "engines give it MLPs without biases, and these have some": getattr(config, "mlp_bias", False),
        f"engines give it the activation silu, and this model has {config.hidden_act}": config.hidden_act != "silu",
        f"its heads are of size {size} / {heads}, and this model's of {head}": head * heads != size,
        f"engines differ in rotary embeddings of type {rope}": rope not in ("default", "llama3"),
        f"its widths are multiples of {MULTIPLE}, and {odd} is none; prune with --round-to {MULTIPLE}": odd,
    }
    return next((reason for reason, applies in obstacles.items() if applies), "")


def has_zero_biases(config: PretrainedConfig) -> bool:
    """Return whether output projections of attention get a bias of zero in the layout deci, as Qwen 2.5 has others."""
    return config.model_type == "qwen2"


def zero_biases(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that a model has in the layout deci alone."""
    if not has_zero_biases(model.config):
        return {}
    layers = range(model.config.num_hidden_layers)
    zeros = torch.zeros(model.config.hidden_size, dtype=model.dtype)
    return {f"model.layers.{layer}.self_attn.o_proj.bias": zeros.clone() for layer in layers}


def in_layout(facts: Facts, model: PreTrainedModel, layout: str) -> Facts:
    """Return the contents of a `config.json` with the keys of a layout, for `model` with its widths."""
    mlps = find_mlps(model)
    widths, names = [mlp.neurons for mlp in mlps], {name for mlp in mlps for name in mlp.stated}
    if layout == DECI:
        return deci_facts(facts, model.config, widths)
    return facts | per_layer(names.pop(), widths) if layout == REMOTE and names else facts


def deci_facts(facts: Facts, config: PretrainedConfig, widths: Sequence[int]) -> Facts:
    """Return the contents of a `config.json` in the layout deci.

    Args:
        facts: contents in another layout.
        config: the same, as transformers reads it.
        widths: MLP widths in layer order.
    """
    named = {name: f"{made.__module__.rpartition('.')[2]}.{made.__name__}" for name, made in CLASSES.items()}
    group, size = config.num_attention_heads // config.num_key_value_heads, config.hidden_size
    return {
        **llama_facts(facts, config),
        **per_layer("intermediate_size", widths),
        "architectures": [DeciLMForCausalLM.__name__],
        "auto_map": {**(facts.get("auto_map") or {}), **named},
        "block_configs": [_block(group, width, size) for width in widths],
        "intermediate_size": max(widths),
        "model_type": DeciConfig.model_type,
    }


def llama_facts(facts: Facts, config: PretrainedConfig) -> Facts:
    """Return the contents of a `config.json` of Llama's for a model that computes the same, of Mistral or Qwen 2."""
    rope = config.rope_parameters
    known = {name: value for name, value in facts.items() if name not in ("mlp_widths", "mlp_maps", *OF_FAMILIES)}
    return {
        **known,
        **{name: getattr(config, name) for name in READ},
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has_zero_biases(config) or bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "model_type": "llama",
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": {**rope}} if rope.get("rope_type", "default") != "default" else {}),
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _block(group: int, width: int, hidden_size: int) -> Facts:
    """Return an entry of `block_configs`, after checking that engines compute its width, also at six decimals."""
    factor = 3 * width / (2 * hidden_size)
    assert width == width_of(factor, hidden_size) == width_of(round(factor, 6), hidden_size)
    plain = {"no_op": False, "replace_with_linear": False}
    return {"attention": {**plain, "n_heads_in_group": group}, "ffn": {**plain, "ffn_mult": factor}}


def per_layer(name: str, widths: Sequence[int]) -> Facts:
    """Return the keys by which transformers 5.14 and later states widths that differ."""
    return {OVERRIDES[0]: {str(layer): {name: width} for layer, width in enumerate(widths)}, OVERRIDES[1]: True}


def layout_of(facts: Facts) -> str:
    """Return the layout of a checkpoint, from the contents of its `config.json`."""
    if facts.get("model_type") == DeciConfig.model_type:
        return DECI
    return REMOTE if "mlp_widths" in facts else STOCK


def plain_facts(facts: Facts) -> Facts:
    """Return a configuration as the stock architecture states it, but for `mlp_widths` where layers differ."""
    facts = dict(facts)
    if layout_of(facts) == STOCK:
        return facts
    for name in OVERRIDES:
        facts.pop(name, None)
    if layout_of(facts) == REMOTE or not _is_plain(facts):
        return facts
    blocks = facts["block_configs"]
    widths = [width_of(block["ffn"]["ffn_mult"], facts["hidden_size"]) for block in blocks]
    codes = {name: code for name, code in (facts.get("auto_map") or {}).items() if name not in CLASSES}
    for name in ("block_configs", "auto_map"):
        facts.pop(name, None)
    group = blocks[0]["attention"]["n_heads_in_group"]
    return facts | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": facts["num_attention_heads"] // group,
        "intermediate_size": max(widths),
        **({"auto_map": codes} if codes else {}),
        **({"mlp_widths": widths} if len({*widths}) > 1 else {}),
    }


def _is_plain(facts: Facts) -> bool:
    """Return whether every block of a configuration has attention, in groups of one size, and an MLP."""
    try:
        blocks = facts["block_configs"]
        groups = {facts["num_attention_heads"] // block["attention"]["n_heads_in_group"] for block in blocks}
        parts = [part for block in blocks for part in (block["attention"], block["ffn"])]
        whole = not any(part.get("no_op") or part.get("replace_with_linear") for part in parts)
        return (
            whole and len(groups) == 1 and all(block["ffn"]["ffn_mult"] * facts["hidden_size"] > 0 for block in blocks)
        )
    except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError):
        return False


def copy_code(folder: Path) -> None:
    """Write the files that transformers loads a checkpoint in the layout deci by."""
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
