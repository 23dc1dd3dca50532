"""A model's `config.json`, checked when it is read: what cannot be is told by key, value and what is wanted."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PretrainedConfig

from hifiprune.errors import UserError
from hifiprune.io.json_files import brief, read_json
from hifiprune.models.library_errors import Facts, explained, find_culprit, in_short, value_at

LIMITS = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**20,
    "vocab_size": 2**26,
    "num_attention_heads": 2**16,
    "max_position_embeddings": 2**40,
}
"""The largest of each size that a model is made with here; published ones are far below. The smallest is 1."""
WIDEST = 2**24
"""Of MLPs, by whatever name their width has."""
WIDTHS = re.compile(r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner)$")
EXPERTS = re.compile(r"(num|n)_\w*experts$")
MOST_EXPERTS = 10_000


def read_configuration(folder: Path) -> Facts:
    """Read the `config.json` of a folder, and check what must be known before any library reads it.

    Raises:
        UserError: it cannot be read, is no JSON object, or states something of a wrong type or size.
    """
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict):
        raise UserError(f"{folder / 'config.json'} must hold a JSON object, not {brief(facts)}; copy it again")
    if "model_type" in facts and not isinstance(facts["model_type"], str):
        raise wrong(folder, "model_type", facts["model_type"], "a name")
    classes = facts.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise wrong(folder, "architectures", classes, "a list of names")
    for part in (facts, *(value for value in facts.values() if isinstance(value, dict))):
        for key in LIMITS.keys() & part.keys():
            if type(part[key]) is int:  # other types are told by transformers
                _check_size(folder, key, part[key], LIMITS[key])
    return facts


def check_sizes(name: str | Path, config: PretrainedConfig) -> None:
    """Refuse sizes that no model can have, in a configuration and those within it.

    Args:
        name: what the message calls the configuration.
        config: as transformers read it.

    Raises:
        UserError: a size is not a whole number, is below 1, or beyond all that is known.
    """
    for part in [config, *(getattr(config, key, None) for key in config.sub_configs)]:
        if not isinstance(part, PretrainedConfig):
            continue
        for common, most in LIMITS.items():
            key = part.attribute_map.get(common, common)
            _check_size(name, key, getattr(part, key, None), most)
        _check_size(name, "num_key_value_heads", getattr(part, "num_key_value_heads", None), 2**16)
        for key, value in part.to_dict().items():
            if WIDTHS.match(key):
                _check_size(name, key, value, WIDEST)
            elif EXPERTS.match(key) and value != 0:
                _check_size(name, key, value, MOST_EXPERTS)
        heads, groups = (getattr(part, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        latent = hasattr(part, "kv_lora_rank")  # such attention has no groups, whatever is stated
        if type(heads) is type(groups) is int and heads % groups and not latent:
            raise wrong(name, "num_key_value_heads", groups, f"a divisor of num_attention_heads, {heads}")
    _check_widths(name, config)


def _check_size(name: str | Path, key: str, value: object, most: int) -> None:
    for size in value if isinstance(value, list) else [value]:
        if size is not None and not (type(size) is int and 1 <= size <= most):
            raise wrong(name, key, value, f"a whole number from 1 to {most:,}")


def _check_widths(name: str | Path, config: PretrainedConfig) -> None:
    """Refuse a list of widths, as checkpoints of ours have where layers differ, that does not fit the model."""
    widths = getattr(config, "mlp_widths", None)
    layers = config.get_text_config().num_hidden_layers
    if widths is None:
        return
    fits = isinstance(widths, list) and len(widths) == layers
    if not fits or not all(type(width) is int and 1 <= width <= WIDEST for width in widths):
        raise wrong(name, "mlp_widths", widths, f"{layers} whole numbers from 1 to {WIDEST:,}, one a layer")
    projections = getattr(config, "mlp_maps", None)
    if projections is not None and not (
        isinstance(projections, list) and all(isinstance(path, str) and "{}" in path for path in projections)
    ):
        raise wrong(name, "mlp_maps", projections, "a list of module paths with {} for the layer")


def wrong(name: str | Path, key: str, value: object, wanted: str) -> UserError:
    """Return the error about a key of a configuration that has a value other than what is wanted."""
    return UserError(
        f"the configuration of {name} cannot be used: {key} is {brief(value)} and should be {wanted}; correct it, or "
        "copy config.json again"
    )


def configuration_explained(
    name: str, facts: Facts | None, use: Callable[[Facts], object]
) -> AbstractContextManager[None]:
    """Turn whatever a library raises about a configuration into one message that names the key.

    Args:
        name: what the user called the model.
        facts: the configuration as it is written; None for a GGUF file.
        use: does what is done within with a configuration, to find the key without which it can be done.

    Raises:
        UserError: something was raised.
        RunError: there was not enough memory.
    """

    def describe(error: Exception) -> UserError:
        said, key = in_short(error), find_culprit(facts, use) if facts else None
        if key and facts:
            return wrong(name, ".".join(key), value_at(facts, key), f"something else ({said})")
        return UserError(f"the configuration of {name} cannot be read: {said}; copy config.json again")

    return explained(name, "the configuration", describe)
