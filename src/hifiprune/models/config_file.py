"""Write the `config.json` of an output: the source's own text with the widths changed, and nothing else."""

import json
import re
from copy import deepcopy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hifiprune.models.layouts import OVERRIDES, in_layout, plain_facts
from hifiprune.models.mlp import locate_mlps, stated_width
from hifiprune.models.modeling_pruned import MixedWidths

CONFIG = "config.json"
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")
"""Numbers of layers that predict further tokens, which transformers does not load and no output holds."""
MIXED = ("architectures", "auto_map", "mlp_widths", "mlp_maps", *OVERRIDES)
"""Keys of configurations whose MLPs differ in width."""
WIDTH_NAME = re.compile(r"intermediate|inner|ffn|feed_forward|mlp")
BLANK = re.compile(r"[ \t\r\n]*")


def config_text(
    source: str, dense: PretrainedConfig, model: PreTrainedModel, saved: dict[str, Any], layout: str
) -> str:
    """Return the text of a `config.json` for `model`: that of its source, but for the widths.

    Every key that states a width is changed, at the top and in the text model's section alike. On top of the source's
    keys come those of MLPs that differ in width, and a width that the source leaves to a default.

    Args:
        source: text of the source's `config.json`.
        dense: that configuration, as transformers reads it.
        model: the model that is written; its own configuration holds the new widths.
        saved: what transformers writes for it.
        layout: how it states widths, see `hifiprune.models.layouts`.
    """
    facts = plain_facts(json.loads(source))
    sections = [facts]
    text = model.config.get_text_config()
    sections += [facts[name] for name, value in vars(model.config).items() if value is text and name in facts]
    if isinstance(model, MixedWidths):
        facts |= {name: saved[name] for name in MIXED if name in saved}
    elif "mlp_widths" in facts:  # the source's MLPs differ in width, and these do not
        for name in MIXED[1:]:
            facts.pop(name, None)
        facts["architectures"] = saved["architectures"]
    for name, (before, after) in _changed_widths(dense, model).items():
        _state(sections, _spellings(text, name), after)
        _state_twins(facts, sections, _spellings(text, name), before, after, model)
    for section in sections:
        section |= {name: 0 for name in FURTHER if section.get(name)}
    return with_members(source, in_layout(facts, model, layout))


def _changed_widths(dense: PretrainedConfig, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the widths before and after, by the names that the configuration has for them, where they differ."""
    names = {mlp.stated[0] for mlp in locate_mlps(model) if len(mlp.stated) == 1}
    old, new = dense.get_text_config(), model.config.get_text_config()
    return {
        name: (stated_width(old, (name,)), getattr(new, name))
        for name in sorted(names)
        if getattr(old, name) != getattr(new, name)
    }


def _spellings(config: PretrainedConfig, name: str) -> list[str]:
    """Return the names by which a configuration's file may state a number, transformers' own first."""
    first = config.attribute_map.get(name, name)
    return [first, *(other for other, meant in config.attribute_map.items() if meant == first)]


def _state(sections: list[dict[str, Any]], names: list[str], width: int) -> None:
    """Set a width in every section that states it, and always in the innermost one."""
    for section in sections:
        section |= {name: width for name in names if name in section}
    if not any(name in sections[-1] for name in names):
        sections[-1][names[0]] = width


def _state_twins(
    facts: dict[str, Any],
    sections: list[dict[str, Any]],
    names: list[str],
    before: int,
    after: int,
    model: PreTrainedModel,
) -> None:
    """State a width by other names that stated the same one, for other readers, unless transformers sizes more by them.

    Such as `intermediate_size` beside `shared_intermediate_size` in a Granite 4 without experts.
    """
    for section in sections:
        for name, value in list(section.items()):
            if name not in names and type(value) is int and value == before and WIDTH_NAME.search(name):
                section[name] = after
                if not _fits(facts, model):
                    section[name] = before


def _fits(facts: dict[str, Any], model: PreTrainedModel) -> bool:
    """Return whether a configuration gives a model of the same shapes."""
    config = type(model.config).from_dict(deepcopy(facts))
    with torch.device("meta"):
        other = type(model)._from_config(config)
    shapes, wanted = ({name: each.shape for name, each in m.state_dict().items()} for m in (other, model))
    return shapes == wanted


def with_members(text: str, facts: dict[str, Any]) -> str:
    """Return the text of a JSON object changed to hold `facts`; members that stay keep their place and spelling.

    Same as `json.dumps(facts)` to whoever reads it.
    """
    start, members, end = _split(text)
    parts = [before + _with_value(value, facts[name]) for name, before, value in members if name in facts]
    blank = BLANK.match(members[0][1] if members else "")
    lead, present = blank.group() if blank else "", {name for name, _, _ in members}
    parts += [f"{lead}{json.dumps(name)}: {json.dumps(facts[name])}" for name in facts if name not in present]
    return start + ",".join(parts) + end


def _with_value(text: str, value: Any) -> str:
    before = json.loads(text)
    if before == value:
        return text
    return with_members(text, value) if isinstance(before, dict) and isinstance(value, dict) else json.dumps(value)


def _split(text: str) -> tuple[str, list[tuple[str, str, str]], str]:
    """Split the text of a JSON object into its start, its members, and its end.

    A member is its name, the text before its value, in which that name stands, and the text of its value.
    """
    start = position = text.index("{") + 1
    members, decode = [], json.JSONDecoder().raw_decode
    while text[_after_blank(text, position)] != "}":
        position += text[position] == ","
        name, colon = decode(text, _after_blank(text, position))
        first = _after_blank(text, _after_blank(text, colon) + 1)
        last = decode(text, first)[1]
        comma = _after_blank(text, last)
        last = last if text[comma] == "}" else comma
        members.append((name, text[position:first], text[first:last]))
        position = last
    return text[:start], members, text[position:]


def _after_blank(text: str, position: int) -> int:
    blank = BLANK.match(text, position)
    return blank.end() if blank else position


def with_rope_theta(saved: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers wrote with the base of the angles at the top too, where other readers look for it."""
    theta = (saved.get("rope_parameters") or {}).get("rope_theta")
    return {"rope_theta": theta} | saved if isinstance(theta, int | float) else saved
