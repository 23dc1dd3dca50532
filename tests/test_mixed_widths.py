"""Models whose MLPs differ in width: what they compute, and that they load with and without this library."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hifiprune import cut_
from hifiprune.engine.temporary_cut import cut
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.models.modeling_pruned import MixedWidths
from hifiprune.plan import Plan
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
from hifiprune.scoring.score import score
from tests.families import MIXED, tiny_model, tiny_tokens
from tests.naive import logits_of, masked_logits
from tests.processes import forked
from tests.test_families import plan_keeping

WIDTHS = [7, 40, 23]


def mixed_plan(model: PreTrainedModel) -> Plan:
    chance = torch.Generator().manual_seed(3)
    return plan_keeping(model, [torch.randperm(40, generator=chance)[:width].sort().values for width in WIDTHS])


@pytest.mark.parametrize("variant", MIXED)
def test_a_mixed_cut_equals_zero_masking_and_loads_everywhere(variant: str, tmp_path: Path) -> None:
    tiny_model(variant).save_pretrained(tmp_path / "dense")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    plan, tokens = mixed_plan(model), tiny_tokens()
    expected = masked_logits(model, plan, tokens)
    cut_(model, plan)
    torch.testing.assert_close(logits_of(model, tokens), expected)
    model.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ours = Checkpoint("pruned", tmp_path).load()
    for loaded in (alone, ours):
        assert [mlp.neurons for mlp in find_mlps(loaded)] == WIDTHS
        # some families hold their tables of angles in float32 once loaded
        torch.testing.assert_close(logits_of(loaded, tokens), logits_of(model, tokens), rtol=1e-4, atol=1e-5)
    assert type(alone).__module__.startswith("transformers_modules."), "it came from the checkpoint's own file"
    assert [mlp.neurons for mlp in find_mlps(Checkpoint("pruned", tmp_path).skeleton())] == WIDTHS
    score(ours, tokens)


def test_a_stock_loader_refuses_mixed_widths_instead_of_guessing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cut_(model, mixed_plan(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_mixed_checkpoint_needs_nothing_but_transformers(fresh: bool, tmp_path: Path) -> None:
    """In a process that has none of our modules: a copy of this one, or a fresh one."""
    model, tokens = tiny_model("qwen2"), tiny_tokens()
    cut_(model, mixed_plan(model))
    model.save_pretrained(tmp_path)
    code = f"""
import sys
for name in ["hifiprune", *(name for name in sys.modules if name.startswith("hifiprune."))]:
    sys.modules[name] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
with torch.no_grad():
    print(repr(model(input_ids=torch.tensor({tokens.tolist()})).logits.sum().item()))
"""
    if fresh:
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    else:
        printed = forked(tmp_path / "told", lambda: exec(code, {})).out
    assert float(printed) == logits_of(model, tokens).sum().item()


def test_a_mixed_cut_for_a_while_leaves_a_stock_model() -> None:
    model, tokens = tiny_model("llama-bias"), tiny_tokens()
    stock, before, configured = type(model), logits_of(model, tokens), model.config.to_dict()
    with cut(model, mixed_plan(model)):
        assert isinstance(model, MixedWidths)
        assert model.config.mlp_widths == WIDTHS
    assert type(model) is stock
    assert model.config.to_dict() == configured
    assert torch.equal(logits_of(model, tokens), before)


def test_a_mixed_model_cut_to_one_width_is_stock_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    stock = type(model)
    cut_(model, mixed_plan(model))
    names = [mlp.name for mlp in find_mlps(model)]
    kept: list[Tensor] = [torch.arange(7)] * 3
    cut_(model, Plan(kept, WIDTHS, names, None, 0.0, 0, 0))
    model.save_pretrained(tmp_path)
    assert type(model) is stock
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.intermediate_size == 7


def test_code_that_a_config_names_itself_stays_named() -> None:
    model = tiny_model("llama")
    theirs = {"AutoModelForCausalLM": "modeling_theirs.Theirs"}
    model.config.auto_map = dict(theirs)
    with cut(model, mixed_plan(model)):
        pass
    assert model.config.auto_map == theirs
    cut_(model, mixed_plan(model))
    assert model.config.auto_map == theirs


@pytest.mark.parametrize("variant", ["gpt_neox", "bloom", "phi3"])
def test_a_mixed_cut_on_the_disk_loads_everywhere(variant: str, tmp_path: Path) -> None:
    tiny_model(variant, torch.float32).save_pretrained(tmp_path / "dense")
    plan, tokens = mixed_plan(tiny_model(variant)), tiny_tokens()
    expected = masked_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), plan, tokens)
    cut_checkpoint(str(tmp_path / "dense"), tmp_path / "cut", plan)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True),
        Checkpoint("pruned", tmp_path / "cut").load(),
    ):
        torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_model_from_its_own_code_is_cut_again(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    cut_(model, mixed_plan(model))
    model.config.auto_map = {"AutoConfig": "configuration_theirs.Theirs"}
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True, dtype=torch.float64)
    kept = [torch.arange(width) for width in (7, 30, 20)]
    plan = Plan(kept, WIDTHS, [mlp.name for mlp in find_mlps(again)], None, 0.0, 0, 0)
    expected = masked_logits(again, plan, tokens)
    cut_(again, plan)
    again.save_pretrained(tmp_path / "twice")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True, dtype=torch.float64)
    assert [mlp.neurons for mlp in find_mlps(loaded)] == [7, 30, 20]
    torch.testing.assert_close(logits_of(loaded, tokens), expected)


def test_new_weights_of_a_mixed_model_are_initialised() -> None:
    model = tiny_model("llama")
    cut_(model, mixed_plan(model))
    made: Any = type(model)(model.config)
    for mlp in find_mlps(made):
        for each in mlp.projections:
            assert 0.1 < each.weight.std() < 0.5, "its initializer_range is 0.3"
