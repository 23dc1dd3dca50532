"""`config.json` of an output is the source's with other widths: nothing else differs, and models load the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hifiprune as hp
from hifiprune.config import AllocationConfig
from hifiprune.models.config_file import with_members
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
from tests.commands import run
from tests.conftest import save_checkpoint
from tests.families import VARIANTS, load, tiny_tokens
from tests.naive import logits_of, masked_logits
from tests.published import PUBLISHED, WIDTHS, as_published, flat, publish
from tests.test_families import plan_keeping

WIDTH_KEYS = {
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim",
    "ffn_hidden_size",
}  # fmt: skip
SMALLER = {40: 24, 56: 32, 60: 40}
"""Widths of the tiny models, and of these cut to three fifths; experts' plain neighbours are rounded to 8."""


def cut_plainly(dense: Path, output: Path, width: int) -> hp.Plan:
    """Prune without text or repair."""
    hp.prune(
        str(dense), output, hp.PruneConfig(hp.Budget(width=width), round_to=1, criterion="magnitude", repair="none")
    )
    return hp.Plan.load(output / "hifiprune" / "plan.json")


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return facts


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations, whose other keys must stand in the same order."""
    one, other = flat(before), flat(after)
    assert [key for key in other if key in one] == list(one)
    return {key: (one.get(key), value) for key, value in other.items() if key not in one or one[key] != value}


def assert_same_as_masked(dense: Path, output: Path, plan: hp.Plan, **how: Any) -> None:
    expected = masked_logits(load(dense), plan, tiny_tokens())
    found = logits_of(load(output, **how), tiny_tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_differs_in_its_widths_alone(variant: str, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", variant)
    (dense / "config.json").write_text(json.dumps(as_published(facts_of(dense))))
    plan = cut_plainly(dense, tmp_path / "cut", 24)
    found = difference(facts_of(dense), facts_of(tmp_path / "cut"))
    if variant == "bloom":  # whose configuration has no place for a width
        maps = {"auto_map.AutoModel", "auto_map.AutoModelForCausalLM"}
        assert {*found} == {"architectures", *maps, "mlp_widths", "mlp_maps"}
        assert found["mlp_widths"] == (None, [24] * 3)
    else:
        stated = {key: value for key, value in flat(facts_of(dense)).items() if key.rpartition(".")[2] in WIDTH_KEYS}
        expected = {key: (width, SMALLER[width]) for key, width in stated.items() if not key.startswith("vision")}
        assert expected
        assert found == expected
    assert_same_as_masked(dense, tmp_path / "cut", plan, trust_remote_code=variant == "bloom")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_differ_in_their_widths_alone(name: str, tmp_path: Path) -> None:
    dense = publish(tmp_path / "dense", PUBLISHED[name])
    plan = cut_plainly(dense, tmp_path / "cut", 24 if "moe_intermediate_size" in PUBLISHED[name] else 48)
    told = flat(PUBLISHED[name])
    expected = {key: (told[key], factor * told[key]) for key, factor in WIDTHS[name].items()}
    assert difference(facts_of(dense), facts_of(tmp_path / "cut")) == expected
    names, kept = (load_file(folder / "model.safetensors").keys() for folder in (dense, tmp_path / "cut"))
    assert kept == names
    assert_same_as_masked(dense, tmp_path / "cut", plan)


ODD = """{\r
\t"zeta" : 1.0,"big":10000.0, "small": 1E-5,\r
\t"word": "\\u00e9 é 模",
\t"none" : null , "n": {"a" :[1,  2]}\r
}\r

"""


@pytest.mark.parametrize(
    ("text", "facts", "expected"),
    [
        ('{"a": 1, "b": 2.0}', {"a": 1, "b": 2.0}, '{"a": 1, "b": 2.0}'),
        ('{"a": 1,\n "b": 2.0}\n', {"a": 7, "b": 2.0}, '{"a": 7,\n "b": 2.0}\n'),
        ('{"a" : 1,"b":2.0 }', {"b": 2.0}, '{"b":2.0 }'),
        ('{\n    "a": 1\n}', {"a": 1, "b": [3]}, '{\n    "a": 1,\n    "b": [3]\n}'),
        ('{"t": {"w": 4, "v": "é"}, "w": 4}', {"t": {"w": 5, "v": "é"}, "w": 5}, '{"t": {"w": 5, "v": "é"}, "w": 5}'),
        ('{"w": 4, "x": 1, "w": 4}', {"w": 5, "x": 1}, '{"w": 5, "x": 1, "w": 5}'),
        ('{"w": "}, \\" {", "x": [{"w": 4}]}', {"w": "}, \" {", "x": []}, '{"w": "}, \\" {", "x": []}'),
        ("{}", {"a": 1}, '{"a": 1}'),
        ("  { }\n", {}, "  { }\n"),
    ],
)  # fmt: skip
def test_members_that_stay_are_written_as_they_were(text: str, facts: dict[str, Any], expected: str) -> None:
    assert with_members(text, facts) == expected
    assert json.loads(expected) == facts


def test_another_value_changes_no_other_byte() -> None:
    facts = json.loads(ODD)
    assert with_members(ODD, facts) == ODD
    assert with_members(ODD, facts | {"n": {"a": [1, 3]}, "zeta": 2}) == ODD.replace("1.0", "2").replace(
        "[1,  2]", "[1, 3]"
    )


def test_unusual_files_keep_every_other_byte(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense")
    start = json.dumps(facts_of(dense), indent=1)[:-2]
    text = start + ',\r\n "team" : "模型 \\u00e9",\n "base":1E4 , "factor":  8.0\n}\n\n'
    (dense / "config.json").write_bytes(text.encode())
    cut_plainly(dense, tmp_path / "cut", 24)
    expected = text.replace('"intermediate_size": 40', '"intermediate_size": 24')
    assert (tmp_path / "cut" / "config.json").read_bytes().decode() == expected


@pytest.mark.parametrize("stated", ["null", "absent"])
def test_a_width_left_to_a_default_is_stated(stated: str, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "gpt2", intermediate_size=96)
    facts = facts_of(dense) | {"n_inner": None}
    facts = facts if stated == "null" else {key: value for key, value in facts.items() if key != "n_inner"}
    (dense / "config.json").write_text(json.dumps(facts))
    plan = cut_plainly(dense, tmp_path / "cut", 40)
    assert difference(facts, facts_of(tmp_path / "cut")) == {"n_inner": (None, 40)}
    assert_same_as_masked(dense, tmp_path / "cut", plan)


def test_a_copy_of_the_text_model_at_the_top_is_changed_too(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "qwen2_vl")
    facts = facts_of(dense)
    facts |= {key: value for key, value in facts["text_config"].items() if key not in facts and key != "model_type"}
    facts["vision_config"] |= {"intermediate_size": 40}
    (dense / "config.json").write_text(json.dumps(facts))
    plan = cut_plainly(dense, tmp_path / "cut", 24)
    widths = {"text_config.intermediate_size": (40, 24), "intermediate_size": (40, 24)}
    assert difference(facts, facts_of(tmp_path / "cut")) == widths
    assert_same_as_masked(dense, tmp_path / "cut", plan)


def test_a_number_that_sizes_something_else_stays(tmp_path: Path) -> None:
    facts = PUBLISHED["granitemoehybrid"] | {"num_local_experts": 1, "num_experts_per_tok": 1}
    assert facts["intermediate_size"] == facts["shared_intermediate_size"]
    dense = publish(tmp_path / "dense", facts)
    plan = cut_plainly(dense, tmp_path / "cut", 48)
    assert difference(facts, facts_of(tmp_path / "cut")) == {"shared_intermediate_size": (64, 48)}
    assert_same_as_masked(dense, tmp_path / "cut", plan)


def test_what_is_pruned_again_differs_from_the_first_by_its_width(tmp_path: Path) -> None:
    publish(tmp_path / "0", PUBLISHED["mistral3"])
    for number, width in enumerate((48, 24)):
        cut_plainly(tmp_path / str(number), tmp_path / str(number + 1), width)
    assert difference(PUBLISHED["mistral3"], facts_of(tmp_path / "2")) == {"text_config.intermediate_size": (64, 24)}
    assert "tie_word_embeddings" not in facts_of(tmp_path / "2")


def test_mixed_widths_come_and_go(tmp_path: Path, world: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", auto_map={"AutoModelForCausalLM": "modeling_theirs.Theirs"})
    (dense / "config.json").write_text(json.dumps(as_published(facts_of(dense))))
    text: Any = hp.Calibration(str(world / "calibration.txt"), num_samples=4, seq_len=24)
    hp.prune(
        str(dense),
        tmp_path / "mixed",
        hp.PruneConfig(hp.Budget(width=24), text, repair="none", allocation=AllocationConfig("global")),
    )
    found = difference(facts_of(dense), facts_of(tmp_path / "mixed"))
    projections = [f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")]
    widths = found.pop("mlp_widths")[1]
    assert len(set(widths)) > 1
    for layer, width in enumerate(widths):
        assert found.pop(f"per_layer_config.{layer}.intermediate_size") == (None, width)
    assert found == {
        "architectures": (["LlamaForCausalLM"], ["PrunedLlamaForCausalLM"]),
        "allow_global_per_layer_attribute_access": (None, True),
        "auto_map.AutoModel": (None, "modeling_pruned.PrunedLlamaModel"),
        "auto_map.AutoModelForCausalLM": ("modeling_theirs.Theirs", "modeling_pruned.PrunedLlamaForCausalLM"),
        "intermediate_size": (40, max(widths)),
        "mlp_maps": (None, projections),
    }
    mixed = load(tmp_path / "mixed", trust_remote_code=True)
    plan = plan_keeping(mixed, [torch.arange(min(widths))] * 3)
    cut_checkpoint(str(tmp_path / "mixed"), tmp_path / "plain", plan)
    again = difference(
        {key: value for key, value in facts_of(dense).items() if key != "auto_map"}, facts_of(tmp_path / "plain")
    )
    assert again == {"intermediate_size": (40, min(widths))}
    assert not [*(tmp_path / "plain").glob("*.py")]


@pytest.mark.parametrize("how", [("--repair", "ridge"), ("--repair", "ridge", "--stream"), ("--repair", "none")])
def test_every_way_of_pruning_writes_the_same(how: tuple[str, ...], tmp_path: Path, world: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense")
    (dense / "config.json").write_text(json.dumps(as_published(facts_of(dense)), indent=3))
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    result = run("prune", dense, "--output", tmp_path / "out", "--width", 24, *text, *how)
    assert result.code == 0, result.err
    expected = (dense / "config.json").read_text().replace('"intermediate_size": 40', '"intermediate_size": 24')
    assert (tmp_path / "out" / "config.json").read_text() == expected


def test_training_changes_no_byte_of_it(tmp_path: Path, world: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense")
    (dense / "config.json").write_text(json.dumps(as_published(facts_of(dense)), indent=3))
    (dense / "generation_config.json").write_text('{"temperature":0.6, "do_sample" :true}')
    words = ("--data", world / "calibration.txt", "--max-steps", 1, "--seq-len", 24, "--output", tmp_path / "out")
    result = run("recover", dense, *words, "--distill-weight", 0, "--lora-r", 4)
    assert result.code == 0, result.err
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()


def test_no_generation_settings_are_invented(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense")
    (dense / "generation_config.json").unlink()
    cut_plainly(dense, tmp_path / "cut", 24)
    assert not (tmp_path / "cut" / "generation_config.json").exists()
