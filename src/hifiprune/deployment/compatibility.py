"""Check from its configuration which inference engines support a checkpoint, and in which formats."""

import json
from dataclasses import dataclass
from math import gcd
from typing import Any

from transformers import PretrainedConfig

from hifiprune.config.groups import REMOTE, STOCK
from hifiprune.deployment.engines import (
    BLOCK,
    BLOCKS,
    ENGINES,
    FAILS,
    FORMS,
    KEYS,
    MIXTURES,
    SHARE,
    SUPPORT,
    THETA,
    Form,
    shown,
)  # fmt: skip
from hifiprune.deployment.gguf_widths import differing_architecture
from hifiprune.errors import UserError
from hifiprune.formatting import width_range
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of, stock_class
from hifiprune.models.mlp import find_mlps

TENSOR_PARALLEL, TEXT = (1, 2, 4, 8), "text_config"


@dataclass(frozen=True)
class Facts:
    """The properties of a checkpoint that compatibility depends on.

    Attributes:
        model_type: model type in the configuration.
        widths: MLP widths in layer order.
        hidden: hidden size.
        heads: number of attention heads.
        key_heads: number of key-value heads.
        head: head dimension.
        gated: whether MLPs have a gate.
        layout: how the configuration states MLP widths: stock, deci or remote.
        biased: whether attention has biases.
        backend: whether Transformers backends of engines can give the model an attention of theirs.
        gguf: architecture of llama.cpp that reads a width for every layer, if there is one.
        keys: keys of its `config.json`, in the text model's section if there is one.
        values: values of the keys that engines read, defaults filled in.
        section: name of that section.
        text_type: the text model's type.
    """

    model_type: str
    widths: tuple[int, ...]
    hidden: int
    heads: int
    key_heads: int
    head: int
    gated: bool = True
    layout: str = STOCK
    biased: bool = False
    backend: bool = True
    gguf: str = ""
    keys: frozenset[str] = frozenset()
    values: tuple[tuple[str, Any], ...] = ()
    section: str = ""
    text_type: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Facts":
        """Read the facts of a checkpoint.

        Raises:
            UserError: it is a GGUF file, which only engines for GGUF read.
        """
        if checkpoint.gguf:
            raise UserError(
                f"{checkpoint.name} is a GGUF file: inspect the folder that it was made from, or the one that prune "
                "writes, to see which engines support it"
            )
        skeleton = checkpoint.skeleton()
        config, family = skeleton.config.get_text_config(), family_of(skeleton.config)
        stated = checkpoint.stated
        section = TEXT if isinstance(stated.get(TEXT), dict) else ""
        return cls(
            skeleton.config.model_type,
            tuple(mlp.neurons for mlp in find_mlps(skeleton)),
            config.hidden_size,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            _head(config),
            len(family.inputs) > 1,
            checkpoint.layout,
            bool(getattr(config, "attention_bias", False)),
            type(skeleton).is_backend_compatible(),
            _differing(config),
            frozenset(stated[section] if section else stated),
            tuple(_values(skeleton.config).items()),
            section,
            config.model_type,
        )


def _differing(config: PretrainedConfig) -> str:
    try:
        return differing_architecture(config)
    except UserError:
        return ""


def _values(whole: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration's values by the names that engines use."""
    config = whole.get_text_config()
    rope, layers = getattr(config, "rope_parameters", None) or {}, getattr(config, "layer_types", None) or []
    full = rope.get("full_attention", rope)
    theta, share = full.get(THETA), full.get(SHARE)
    found = {
        THETA: theta,
        "rope_local_base_freq": rope.get("sliding_attention", {}).get(THETA),
        "rotary_emb_base": theta,
        SHARE: share,
        "rotary_pct": share or 1.0,
        "n_ctx": config.max_position_embeddings if config.model_type == "gpt2" else None,
        "head_dim": _head(config),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "architectures": [stock_class(config).__name__] if config.model_type in SUPPORT else None,
        "sliding_window_pattern": layers.index("full_attention") + 1 if "full_attention" in layers else None,
        "num_experts": getattr(config, "num_experts", None),
        "tie_word_embeddings": bool(whole.tie_word_embeddings),
    }
    scaled = full.get("rope_type", "default") != "default"
    return {name: value for name, value in found.items() if value is not None} | {
        "rope_scaling": full if scaled else None
    }


def _head(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Answer:
    """The compatibility of a checkpoint with an engine in a format.

    Attributes:
        engine: name of the engine.
        version: version that was checked.
        form: format.
        verdict: `yes`, `partly`, `no` or `unknown`.
        why: reason of the verdict.
        tensor_parallel: tensor-parallel sizes that width and heads allow; empty for engines without tensor parallelism,
            or if the verdict is no.
        sources: URLs of the evidence.
    """

    engine: str
    version: str
    form: str
    verdict: str
    why: str
    tensor_parallel: tuple[int, ...]
    sources: tuple[str, ...]


def deployment(checkpoint: Checkpoint) -> list[Answer]:
    """Check every engine and format for a checkpoint, without reading its weights.

    Raises:
        UserError: it is a GGUF file, or not a checkpoint that can be read.
    """
    facts = Facts.of(checkpoint)
    return [answer(facts, form) for form in FORMS]


def answer(facts: Facts, form: Form) -> Answer:
    """Return whether the engine of a format takes such a checkpoint in it."""
    engine = ENGINES[form.engine]
    verdict, why, source = _at_all(facts, form.engine)
    sizes: tuple[int, ...] = ()
    sources = [source]
    if verdict == "yes":
        verdict, why_not, sizes = _by_sizes(facts, form)
        why = "; ".join(filter(None, (why, why_not)))
        sources += [each for each in (form.source, engine.splits) if each]
    return Answer(engine.name, engine.version, form.name, verdict, why, sizes, tuple(dict.fromkeys(sources)))


def _at_all(facts: Facts, key: str) -> tuple[str, str, str]:
    """Return the verdict that holds for all formats, its reason and its sources."""
    engine, kind = ENGINES[key], dict(zip(ENGINES, SUPPORT.get(facts.model_type, ()), strict=False)).get(key, "unknown")
    name = f"'{facts.model_type}'"
    if facts.layout != STOCK:
        return _of_mixed(facts, key)
    if kind == "no":
        return "no", f"has no implementation of model type {name}", engine.models
    if kind == "unknown":
        return "unknown", f"nothing is known about model type {name}", engine.models
    if kind == "fixed" and {*facts.widths} != {4 * facts.hidden}:
        what = f"hard-codes an MLP width of 4 x hidden size = {4 * facts.hidden:,} for model type {name}"
        mend = f"; {engine.mend.format(facts.widths[0])}" if engine.mend else ""
        return "no", f"{what}, this checkpoint has {width_range([*facts.widths])}{mend}", engine.fixed
    if missing := missing_keys(facts, key):
        stated = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in missing.items())
        defaults = [shown(value) for name in missing if (value := _wanted(facts, key).get(name, FAILS)) != FAILS]
        taken = f"silently assumes {', '.join(defaults)} if it is missing"
        then = taken if defaults else "fails or gives wrong results without it"
        place = f"in {facts.section}" if facts.section else "at the top level"
        why = f"reads {' and '.join(missing)} {place} of config.json and {then}; add {stated}"
        return "no", why, engine.models
    how = {"backend": "through its Transformers backend", "autodeploy": "through AutoDeploy"}
    return "yes", how.get(kind, ""), engine.models


def _of_mixed(facts: Facts, key: str) -> tuple[str, str, str]:
    """Return the verdict for a checkpoint in the layout deci or remote, its reason and its source."""
    engine = ENGINES[key]
    if key == "llama.cpp" and facts.gguf:
        return "yes", f"as architecture {facts.gguf}, by hifiprune export", engine.deci
    if facts.layout == REMOTE:
        if engine.mixed == "yes" and not facts.backend:
            return "no", f"its Transformers backend does not take models of type '{facts.model_type}'", engine.code
        return engine.mixed, engine.why, engine.code
    if key == "tensorrt-llm" and facts.biased:
        return "no", "its DeciLMForCausalLM has no biases in attention, and this model has", engine.deci
    code = " with --trust-remote-code" if engine.splits else ""
    return "yes", f"as DeciLMForCausalLM{code}", engine.deci


def missing_keys(facts: Facts, key: str) -> dict[str, Any]:
    """Return the keys that an engine reads from `config.json` and would miss or misread."""
    values, wanted = dict(facts.values), _wanted(facts, key)
    if key == "mlx" and THETA in wanted:
        wanted = {"rope_scaling": None} | wanted
    absent = {name: default for name, default in wanted.items() if name not in facts.keys}
    return {name: values[name] for name, default in absent.items() if name in values and values[name] != default}


def _wanted(facts: Facts, key: str) -> dict[str, Any]:
    """Return the keys that an engine reads for such a model, or for its text model."""
    rows = KEYS.get(key, {})
    return {**rows.get(facts.model_type, {}), **rows.get(facts.text_type, {})}


def _by_sizes(facts: Facts, form: Form) -> tuple[str, str, tuple[int, ...]]:
    """Return the verdict by the sizes of the weights, its reason if it is not yes, and the tensor-parallel sizes."""
    shares = bool(ENGINES[form.engine].splits)
    if facts.model_type in MIXTURES and form.multiple > 1 and shares:
        return "unknown", "the kernels for experts were not looked up", ()
    even = [size for size in TENSOR_PARALLEL if facts.heads % size == 0 and not any(w % size for w in facts.widths)]
    whole = even if shares else [1]
    if sizes := [size for size in whole if not _obstacles(facts, form, size)]:
        return "yes", "", tuple(sizes) if shares else ()
    obstacles = _obstacles(facts, form, 1)
    then, odd = form.then, [name for name, size in obstacles.items() if size % BLOCK]
    if form.engine == "llama.cpp" and odd:
        then = f"{then}; f16 for {' and '.join(odd)}" if len(odd) < len(obstacles) else "such tensors become f16"
    found = " and ".join(f"{name} {size:,}" for name, size in obstacles.items())
    what = "is not a multiple" if len(obstacles) == 1 else "are not multiples"
    why = f"{found} {what} of {form.multiple}: {then}"
    return form.otherwise, why, tuple(whole) if shares and form.otherwise == "partly" else ()


def _obstacles(facts: Facts, form: Form, gpus: int) -> dict[str, int]:
    """Return the sizes, per GPU, that are not multiples of what a format needs."""
    heads, keys = facts.heads // gpus * facts.head, max(1, facts.key_heads // gpus) * facts.head
    sizes = {"MLP width": gcd(*facts.widths) // gpus}  # what that is a multiple of, all layers' widths are
    if form.name == BLOCKS:  # of matrices laid together, and of shares; what reads the hidden size is neither
        others = {"query width": heads, "key width": keys}
        sizes = sizes if facts.gated or gpus > 1 else {}
    else:
        others = {"hidden size": facts.hidden, "attention width": heads}
    return {name: size for name, size in (sizes | others).items() if size % form.multiple}


def remark_on_mixed() -> str:
    """Return a sentence on who runs checkpoints whose MLPs differ in width."""
    names = [engine.name for engine in ENGINES.values()]
    return (
        "Checkpoints with layers of different widths load in transformers with trust_remote_code=True. In the layout "
        f"deci {', '.join(names[:-1])} and {names[-1]} have an implementation of them; hifiprune inspect --deploy "
        "tells who runs a checkpoint."
    )
