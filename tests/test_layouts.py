"""Layouts of outputs whose widths differ: what is written, who reads it, and that it computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hifiprune as hp
from hifiprune.config.groups import AllocationConfig
from hifiprune.errors import UserError
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.layouts import deci_obstacle, plain_facts
from hifiprune.models.mlp import find_mlps
from hifiprune.models.save_model import save_model
from hifiprune.plan import Plan
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
from tests.commands import run
from tests.conftest import save_checkpoint
from tests.families import MIXED, tiny_config, tiny_model, tiny_tokens
from tests.naive import logits_of, masked_logits

WIDE, HEAD, WIDTHS = 768, 6, [256, 768, 512]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": HEAD},
    "llama-tied": {"head_dim": HEAD},
    "llama-bias": {"head_dim": HEAD, "mlp_bias": False},
    "mistral": {"head_dim": HEAD, "sliding_window": None},
    "qwen2": {"head_dim": HEAD},
}
"""Variants that the layout deci holds."""


def saved(folder: Path, variant: str) -> Path:
    tiny_model(variant, torch.float32, intermediate_size=WIDE, **SIZES.get(variant, {})).save_pretrained(folder)
    return folder


def plan_for(folder: Path, widths: list[int] = WIDTHS) -> Plan:
    chance = torch.Generator().manual_seed(3)
    mlps = find_mlps(Checkpoint("dense", folder).skeleton())
    kept = [
        torch.randperm(mlp.neurons, generator=chance)[:width].sort().values
        for mlp, width in zip(mlps, widths, strict=True)
    ]
    return Plan(kept, [mlp.neurons for mlp in mlps], [mlp.name for mlp in mlps], None, 0.0, 0, 0)


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return facts


@pytest.mark.parametrize("variant", SIZES)
def test_deci_computes_the_same_in_transformers(variant: str, tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", variant)
    plan, tokens = plan_for(dense), tiny_tokens()
    expected = masked_logits(AutoModelForCausalLM.from_pretrained(dense), plan, tokens)
    cut_checkpoint(str(dense), tmp_path / "cut", plan)
    facts = facts_of(tmp_path / "cut")
    assert (facts["model_type"], facts["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    assert type(causal).__module__.startswith("transformers_modules."), "it came from the checkpoint's own file"
    ours = Checkpoint("cut", tmp_path / "cut").load()
    for model in (causal, ours):
        torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-5)
    base = AutoModel.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    with torch.no_grad():
        hidden = base(tokens).last_hidden_state
        assert torch.equal(hidden, causal.base_model(tokens).last_hidden_state)
        torch.testing.assert_close(causal.lm_head(hidden).double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_deci_is_the_same_from_memory_as_from_files(variant: str, tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", variant)
    plan, source = plan_for(dense), find_checkpoint(str(tmp_path / "dense"))
    cut_checkpoint(str(dense), tmp_path / "files", plan)
    model = source.load()
    hp.cut_(model, plan)
    save_model(model, source, tmp_path / "memory")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "memory"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert facts_of(tmp_path / "files") == facts_of(tmp_path / "memory")


def test_deci_of_qwen_has_zero_biases_and_no_window(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "qwen2")
    cut_checkpoint(str(dense), tmp_path / "cut", plan_for(dense))
    facts, tensors = facts_of(tmp_path / "cut"), load_file(tmp_path / "cut" / "model.safetensors")
    assert facts["attention_bias"] is True
    assert not {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"} & facts.keys()
    biases = [values for name, values in tensors.items() if name.endswith("o_proj.bias")]
    assert [(values.shape, values.abs().max().item()) for values in biases] == [((24,), 0.0)] * 3
    assert tensors["model.layers.0.self_attn.q_proj.bias"].abs().min() > 0


@pytest.mark.by_layout
@pytest.mark.parametrize("variant", MIXED)
def test_remote_has_a_base_model_for_every_family(variant: str, tmp_path: Path) -> None:
    """As vLLM's and SGLang's Transformers backends build it: `AutoModel.from_config`, then its attention is theirs."""
    widths = [7, 40, 23]
    tiny_model(variant, torch.float32).save_pretrained(tmp_path / "dense")
    cut_checkpoint(str(tmp_path / "dense"), tmp_path / "cut", plan_for(tmp_path / "dense", widths), layout="remote")
    config = AutoConfig.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModel.from_config(config, trust_remote_code=True).named_parameters()}
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    base = AutoModel.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    assert shapes == {name: parameter.shape for name, parameter in base.named_parameters()}
    tokens = tiny_tokens()
    with torch.no_grad():
        assert torch.equal(base(tokens)[0], causal.base_model(tokens)[0])
    assert [mlp.neurons for mlp in find_mlps(causal)] == widths


@pytest.mark.parametrize(("variant", "layout"), [("llama", "deci"), ("llama", "remote"), ("gpt2", "remote")])
def test_transformers_keeps_the_width_of_every_layer(variant: str, layout: str, tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", variant)
    cut_checkpoint(str(dense), tmp_path / "cut", plan_for(dense), layout=layout)
    config = AutoConfig.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    key = "n_inner" if variant == "gpt2" else "intermediate_size"
    assert [getattr(layer, key) for layer in config.per_layer_config] == WIDTHS
    assert getattr(config, key) == WIDE, "engines read it without asking for a layer"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert [getattr(layer, key) for layer in again.per_layer_config] == WIDTHS
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits_of(loaded, tiny_tokens()), logits_of(model, tiny_tokens()))
    assert AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)


@pytest.mark.parametrize("first", ["deci", "remote"])
@pytest.mark.parametrize(("second", "widths"), [("deci", [256, 256, 512]), ("remote", [8, 9, 7]), ("stock", [256] * 3)])
def test_a_layout_changes_into_another(first: str, second: str, widths: list[int], tmp_path: Path) -> None:
    dense, tokens = saved(tmp_path / "dense", "llama"), tiny_tokens()
    cut_checkpoint(str(dense), tmp_path / "once", plan_for(dense), layout=first)
    plan = plan_for(tmp_path / "once", widths)
    expected = masked_logits(Checkpoint("once", tmp_path / "once").load(), plan, tokens)
    cut_checkpoint(str(tmp_path / "once"), tmp_path / "twice", plan, layout=second)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=second != "stock")
    torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=1e-4, atol=1e-5)
    assert Checkpoint("twice", tmp_path / "twice").layout == second
    code = {"stock": set(), "remote": {"modeling_pruned.py"}}.get(second)
    found = {path.name for path in (tmp_path / "twice").glob("*.py")}
    assert found == ({"configuration_deci.py", "modeling_deci.py", "modeling_pruned.py"} if code is None else code)
    if second == "stock":
        assert facts_of(tmp_path / "twice").keys() >= facts_of(dense).keys()
        assert not {"block_configs", "per_layer_config", "mlp_widths", "auto_map"} & facts_of(tmp_path / "twice").keys()


@pytest.mark.parametrize("layout", ["deci", "remote"])
def test_equal_widths_take_any_layout(layout: str, tmp_path: Path) -> None:
    dense, tokens = saved(tmp_path / "dense", "llama"), tiny_tokens()
    plan = plan_for(dense, [512] * 3)
    expected = masked_logits(AutoModelForCausalLM.from_pretrained(dense), plan, tokens)
    cut_checkpoint(str(dense), tmp_path / "cut", plan, layout=layout)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=1e-4, atol=1e-5)
    assert Checkpoint("cut", tmp_path / "cut").layout == layout
    find_mlps(Checkpoint("cut", tmp_path / "cut").load())


@pytest.mark.parametrize(
    ("variant", "options", "widths", "words"),
    [
        ("qwen3", {}, [256], "it is for Llama, Mistral and Qwen 2.5, and this is a qwen3 model"),
        ("mistral", {"head_dim": HEAD}, [256], "no sliding window, and this model has one of 5 tokens"),
        ("llama", {"head_dim": HEAD, "mlp_bias": True}, [256], "MLPs without biases"),
        ("llama", {"head_dim": HEAD, "hidden_act": "gelu"}, [256], "activation silu, and this model has gelu"),
        ("llama", {}, [256], "heads are of size 24 / 4, and this model's of 8"),
        ("llama", {"head_dim": HEAD}, [256, 384], "multiples of 256, and 384 is none; prune with --round-to 256"),
        (
            "llama",
            {"head_dim": HEAD, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            [256],
            "rotary embeddings of type linear",
        ),
    ],
)
def test_what_deci_cannot_hold_is_told(variant: str, options: Any, widths: list[int], words: str) -> None:
    assert words in deci_obstacle(tiny_config(variant, **options), widths)


def test_a_layout_that_does_not_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", head_dim=HEAD, intermediate_size=WIDE)
    narrow = save_checkpoint(tmp_path / "narrow", head_dim=HEAD, intermediate_size=400)
    experts = save_checkpoint(tmp_path / "experts", "mixtral")
    apart = ("--allocation", "global")
    for model, flags, words in (
        (dense, ("--layout", "stock", *apart), "layout stock holds one width for all layers"),
        (dense, ("--layout", "deci", "--round-to", 64, *apart), "prune with --round-to 256"),
        (narrow, ("--layout", "deci", *apart), "multiples of 256, and 400 is none"),
        (experts, ("--layout", "remote", "--round-to", 8), "layout remote is not for a mixtral model"),
        (dense, ("--layout", "nas"), "layout 'nas' is not known"),
    ):
        result = run("prune", model, "--output", tmp_path / "out", "--ratio", 0.3, *flags, "--criterion", "magnitude")
        assert result.code == 2, result.out + result.err
        assert words in " ".join(result.err.split())
        assert not (tmp_path / "out").exists()


def test_prune_and_recover_keep_widths_that_differ_in_deci(tmp_path: Path, world: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", head_dim=HEAD, intermediate_size=1280)
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    words = ("--allocation", "global", "--floor", 0.1, "--neuron-ratio", 0.4, *text)
    result = run("prune", dense, "--output", tmp_path / "cut", "--layout", "deci", *words)
    assert result.code == 0, result.err
    widths = Checkpoint("cut", tmp_path / "cut").config().mlp_widths
    assert {width % 256 for width in widths} == {0}
    assert len({*widths}) > 1
    data = ("--data", world / "calibration.txt", "--max-steps", 1, "--seq-len", 24, "--lora-r", 4)
    result = run("recover", tmp_path / "cut", *data, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert facts_of(tmp_path / "out") == facts_of(tmp_path / "cut")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_automatic_layouts_follow_the_widths_and_never_change_them(tmp_path: Path, world: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", head_dim=HEAD, intermediate_size=1280)
    text: Any = hp.Calibration(str(world / "calibration.txt"), num_samples=4, seq_len=24)
    layouts, plans = {}, {}
    for step, layout in ((64, "auto"), (64, "remote"), (256, "auto")):
        folder = tmp_path / f"{step}-{layout}"
        config = hp.PruneConfig(
            hp.Budget(neuron_ratio=0.4), text, round_to=step, allocation=AllocationConfig("global", 0.1), layout=layout
        )
        hp.prune(str(dense), folder, config)
        layouts[step, layout] = Checkpoint("x", folder).layout
        plans[step, layout] = (folder / "hifiprune" / "plan.json").read_bytes()
    assert layouts == {(64, "auto"): "remote", (64, "remote"): "remote", (256, "auto"): "deci"}
    assert plans[64, "auto"] == plans[64, "remote"]


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("key", ["no_op", "replace_with_linear"])
def test_blocks_without_a_part_are_not_read(part: str, key: str, tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "llama")
    cut_checkpoint(str(dense), tmp_path / "cut", plan_for(dense))
    facts = facts_of(tmp_path / "cut")
    assert plain_facts(facts)["model_type"] == "llama"
    facts["block_configs"][1][part][key] = True
    (tmp_path / "cut" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"model type .nemotron-nas. .* is not supported"):
        Checkpoint("cut", tmp_path / "cut").config()
