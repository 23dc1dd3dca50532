"""Detect the layout of architectures outside the table by their parameter shapes; it is verified on their weights."""

import json
from collections.abc import Collection, Iterator
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
from hifiprune.models.families import FAMILIES, Family, known_family

Layout = tuple[str, tuple[str, ...], str]
"""Path of an MLP in its block, and names of its input projections and its output projection."""
SETTLED = "hifiprune_family"
"""Attribute of a configuration in memory that caches the detected layout."""
LEAST_SHARE = 0.25
"""Smallest share of the blocks' parameters in MLPs; a shared expert beside a hundred others holds less."""
STEP = 8
"""Change of a configuration's number that shows which projections depend on it."""


def family_of(config: PretrainedConfig) -> Family:
    """Return the layout of an architecture, from the table or detected.

    Raises:
        UserError: it is not in the table, and its MLPs cannot be told from its structure.
    """
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    if SETTLED in config.__dict__:
        settled: Family = config.__dict__[SETTLED]
        return settled
    if config.model_type not in CONFIG_MAPPING or stock_class(config) is None:
        return known_family(config.model_type, config.architectures)
    plain = config.to_dict()
    plain.pop("mlp_widths", None)
    return _discovered(json.dumps(plain, sort_keys=True, default=str))


def settled_family(config: PretrainedConfig) -> Family:
    """Return the layout, cached on the configuration before pruning changes the widths that detection relies on."""
    family = family_of(config)
    if family.detected:
        config.__dict__[SETTLED] = family
    return family


def stock_class(config: PretrainedConfig) -> Any:
    """Return the transformers class for a causal or image-text model of this configuration, None without one."""
    kind = type(config)
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)


@cache
def _discovered(text: str) -> Family:
    """Change each number of the configuration in turn; find the one that resizes exactly the projections of MLPs."""
    facts = json.loads(text)
    config: Any = CONFIG_MAPPING[facts["model_type"]].from_dict(facts)
    sizes = config.get_text_config()
    if missing := [name for name in ("num_hidden_layers", "hidden_size") if not hasattr(sizes, name)]:
        raise _unknown(config, f"its configuration has no {' and no '.join(missing)}")
    model = _skeleton(config)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == sizes.num_hidden_layers
    ]
    if len(lists) != 1:
        raise _unknown(config, f"{len(lists)} lists of {sizes.num_hidden_layers} blocks were found")
    ((blocks, found),) = lists
    known = dict(model.named_parameters())
    numbers = {size for name, values in known.items() if name.startswith(f"{blocks}.") for size in values.shape}
    layouts: dict[Layout, str] = {}
    stated = {name for name, value in sizes.to_dict().items() if type(value) is int and value in numbers}
    for name in sorted(stated - {"num_hidden_layers"}):
        changes = _changes(config, name, known)
        if layout := changes and _layout(changes, blocks, found, sizes.hidden_size):
            layouts.setdefault(layout, name)
    if len(layouts) != 1:
        projections = [f"{name} {each.weight.shape[0]} x {each.weight.shape[1]}" for name, each in _linears(found[0])]
        raise _unknown(
            config,
            f"{len(layouts) or 'none'} of the numbers in its configuration widen an MLP in every block, where one was "
            f"looked for; the first block holds {', '.join(projections) or 'no projections'}",
        )
    (((mlp, inputs, output), width),) = layouts.items()
    held = _share(found, mlp, {*inputs, output})
    if held < LEAST_SHARE:
        raise _unknown(config, f"{mlp or 'what'} looks like an MLP, but holds {held:.0%} of the blocks' parameters")
    takes_images = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is None
    norm = _norm_of(config, model, blocks)
    return Family(
        blocks,
        norm,
        mlp,
        inputs,
        output,
        width,
        additive=False,
        takes_images=takes_images,
        separates_packed=False,
        detected=True,
    )


def _unknown(config: PretrainedConfig, seen: str) -> UserError:
    return UserError(
        f"model type '{config.model_type}' is not in the table of families, and its MLPs could not be told from its "
        f"structure: {seen}; docs/families.md says what can be cut"
    )


def _skeleton(config: PretrainedConfig) -> Any:
    try:
        with torch.device("meta"):
            return stock_class(config)._from_config(config)
    except Exception as error:  # whatever code that is not known to us raises
        raise _unknown(config, f"the model cannot be made ({type(error).__name__}: {error})") from error


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    return ((name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear | Conv1D))


def _changes(config: PretrainedConfig, name: str, known: dict[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    """Return by how much each parameter's dimensions grow with a number; None if no such model can be built."""
    other = type(config).from_dict(config.to_dict())
    sizes = other.get_text_config()
    setattr(sizes, name, getattr(sizes, name) + STEP)
    try:
        found = dict(_skeleton(other).named_parameters())
    except UserError:  # another number must divide it
        return {}
    if found.keys() != known.keys():
        return {}
    grown = {key: tuple(a - b for a, b in zip(found[key].shape, known[key].shape, strict=True)) for key in known}
    return {key: sizes for key, sizes in grown.items() if any(sizes)}


def _layout(changes: dict[str, tuple[int, ...]], blocks: str, found: nn.ModuleList, hidden: int) -> Layout | None:
    """Return path, input projections and output projection of every block's MLP, if exactly these changed."""
    layouts = set()
    for index, block in enumerate(found):
        start, linears = f"{blocks}.{index}.", dict(_linears(block))
        own = {key.removeprefix(start): sizes for key, sizes in changes.items() if key.startswith(start)}
        projections = {key.rpartition(".")[0]: sizes for key, sizes in own.items() if len(sizes) == 2}
        parents = {name.rpartition(".")[0] for name in projections}
        strangers = [key for key in own if key.rpartition(".")[0] not in projections.keys() & linears.keys()]
        if len(parents) != 1 or strangers:
            return None
        rows = {
            name: sizes if isinstance(linears[name], nn.Linear) else sizes[::-1] for name, sizes in projections.items()
        }
        outputs = [name for name, sizes in rows.items() if sizes == (0, STEP)]
        inputs = [name for name in rows if name not in outputs]
        if [rows[name] for name in inputs] == [(2 * STEP, 0)]:
            inputs *= 2
        elif {rows[name] for name in inputs} != {(STEP, 0)} or len(inputs) > 2:
            return None
        ends = {linears[name].weight.shape[int(isinstance(linears[name], nn.Linear))] for name in inputs}
        ends |= {linears[name].weight.shape[int(isinstance(linears[name], Conv1D))] for name in outputs}
        if len(outputs) != 1 or ends != {hidden}:
            return None
        short = [name.rpartition(".")[2] for name in (*inputs, *outputs)]
        layouts.add((parents.pop(), tuple(short[:-1]), short[-1]))
    starts = tuple(f"{blocks}.{index}." for index in range(len(found)))
    return layouts.pop() if len(layouts) == 1 and all(key.startswith(starts) for key in changes) else None


def _share(found: nn.ModuleList, mlp: str, projections: Collection[str]) -> float:
    """Return the fraction of the blocks' parameters that the projections hold."""
    held = sum(
        parameter.numel()
        for block in found
        for name in projections
        for parameter in block.get_submodule(mlp).get_submodule(name).parameters()
    )
    return held / sum(parameter.numel() for parameter in found.parameters())


def _norm_of(config: PretrainedConfig, model: nn.Module, blocks: str) -> str:
    """Return the final norm: the one module after the blocks whose parameters are all vectors of the hidden size."""
    parent, _, name = blocks.rpartition(".")
    children = dict(model.get_submodule(parent).named_children())
    after = list(children)[list(children).index(name) + 1 :]
    size = (config.get_text_config().hidden_size,)
    after = [each for each in after if "emb" not in each]
    norms = [each for each in after if (own := [*children[each].parameters()]) and all(p.shape == size for p in own)]
    if len(norms) != 1:
        raise _unknown(config, f"{len(norms)} norms were found after the blocks, where one was looked for")
    return ".".join(filter(None, (parent, norms[0])))
