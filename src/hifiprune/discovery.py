"""Layouts of architectures that are not in the table, found by the shapes of their maps and proved on their weights."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from hifiprune.errors import UserError
from hifiprune.families import FAMILIES, Family, known_family

Maps = dict[str, tuple[int, int]]
"""Outputs and inputs of linear maps, by their names in their parent."""
STEP = 8
"""By how much a configuration's width is changed to see which maps follow."""


def family_of(config: PretrainedConfig) -> Family:
    """The layout of an architecture: from the table, or found out.

    Raises:
        UserError: it is not in the table, and its MLPs cannot be told from its structure.
    """
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    if not isinstance(CONFIG_MAPPING.get(config.model_type, 0), type) or stock_class(config) is None:
        return known_family(config.model_type, config.architectures)
    plain = config.to_dict()
    plain.pop("mlp_widths", None)
    return _discovered(json.dumps(plain, sort_keys=True, default=str))


def stock_class(config: PretrainedConfig) -> Any:
    """The class of transformers for a language model of this configuration, or one that sees images too, if any."""
    kind = type(config)
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)


@cache
def _discovered(text: str) -> Family:
    facts = json.loads(text)
    config: Any = CONFIG_MAPPING[facts["model_type"]].from_dict(facts)
    model, sizes = _skeleton(config), config.get_text_config()
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == sizes.num_hidden_layers
    ]
    if len(lists) != 1:
        raise _unknown(config, f"{len(lists)} lists of {sizes.num_hidden_layers} blocks were found")
    ((blocks, found),) = lists
    layouts = {tuple(_mlps_in(block, sizes.hidden_size)) for block in found}
    if len(layouts) != 1 or len(next(iter(layouts))) != 1:
        seen = sorted(
            {
                f"{mlp or 'the block'}: {', '.join(inputs)} to {output}"
                for each in layouts
                for mlp, inputs, output in each
            }
        )
        raise _unknown(config, f"not one MLP like the others in each block, but {'; '.join(seen) or 'none'}")
    ((mlp, inputs, output),) = next(iter(layouts))
    width = _width_name(config, blocks, mlp, output)
    return Family(
        blocks, _norm_of(config, model, blocks), mlp, inputs, output, width, additive=False, packs=False, found=True
    )


def _unknown(config: PretrainedConfig, seen: str) -> UserError:
    return UserError(
        f"model type '{config.model_type}' is not in the table of families, and its MLPs could not be told from its "
        f"structure: {seen}; supported are {', '.join(sorted(FAMILIES))}"
    )


def _skeleton(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return stock_class(config)._from_config(config)


def _mlps_in(block: nn.Module, hidden: int) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Modules all of whose linear maps are those of an MLP: its path, its input maps and its output map."""
    for path, module in block.named_modules():
        maps = {name: _sizes(each) for name, each in module.named_children() if isinstance(each, nn.Linear | Conv1D)}
        outputs = [name for name, (rows, columns) in maps.items() if rows == hidden and columns != hidden]
        inputs = [name for name in maps if name not in outputs]
        if len(outputs) != 1 or not inputs:
            continue
        width = maps[outputs[0]][1]
        if all(maps[name] == (width, hidden) for name in inputs) and len(inputs) <= 2:
            yield path, tuple(inputs), outputs[0]
        elif [maps[name] for name in inputs] == [(2 * width, hidden)]:
            yield path, (inputs[0], inputs[0]), outputs[0]


def _sizes(module: Any) -> tuple[int, int]:
    first, second = module.weight.shape
    return (first, second) if isinstance(module, nn.Linear) else (second, first)


def _norm_of(config: PretrainedConfig, model: nn.Module, blocks: str) -> str:
    """Of what stands after the blocks, the one module that has only vectors of the hidden size."""
    parent, _, name = blocks.rpartition(".")
    children = dict(model.get_submodule(parent).named_children())
    after = list(children)[list(children).index(name) + 1 :]
    size = (config.get_text_config().hidden_size,)
    norms = [each for each in after if (own := [*children[each].parameters()]) and all(p.shape == size for p in own)]
    if len(norms) != 1:
        raise _unknown(config, f"{len(norms)} norms were found after the blocks, where one was looked for")
    return ".".join(filter(None, (parent, norms[0])))


def _width_name(config: PretrainedConfig, blocks: str, mlp: str, output: str) -> str:
    """What the configuration calls the width: the number that changes the shapes of the MLPs, and of nothing else."""
    sizes, known = config.get_text_config(), dict(_skeleton(config).named_parameters())
    ours = re.compile(re.escape(f"{blocks}.") + r"\d+\." + re.escape(f"{mlp}." if mlp else ""))
    width = known[".".join(filter(None, (blocks, "0", mlp, output, "weight")))]
    for name in [name for name, value in sizes.to_dict().items() if type(value) is int and value in width.shape]:
        other = type(config).from_dict(config.to_dict())
        setattr(other.get_text_config(), name, getattr(sizes, name) + STEP)
        with suppress(ValueError, RuntimeError, TypeError, AttributeError):  # a number that others must divide
            found = dict(_skeleton(other).named_parameters())
            changed = [key for key in known if key not in found or found[key].shape != known[key].shape]
            if changed and all(ours.match(key) for key in changed):
                return name
    raise _unknown(config, f"nothing in the configuration states the width of {blocks}.0.{mlp} alone")
