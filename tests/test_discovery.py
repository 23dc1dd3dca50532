"""Architectures outside the table: found by structure, proved on weights, or refused with what was seen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hifiprune as hp
from hifiprune.commands.cost_model import Estimator
from hifiprune.config import CriterionOptions
from hifiprune.models.detect import family_of
from hifiprune.models.families import FAMILIES
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_mlps
from tests.commands import refused, run
from tests.conftest import byte_tokenizer
from tests.families import LATENT, SIZES, VOCABULARY, tiny_config, tiny_tokens
from tests.naive import logits_of, masked_logits
from tests.test_families import chain_sweep, naive_sweep, random_plan

FOUND: dict[str, dict[str, Any]] = {
    "apertus": {"intermediate_size": 40, "num_key_value_heads": 2},
    "biogpt": {"intermediate_size": 40},
    "cwm": {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 5},
    "internlm3": {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6},
    "minicpm3": {"intermediate_size": 40, "num_key_value_heads": 4, **LATENT},
    "persimmon": {"intermediate_size": 40, "num_attention_heads": 3},
}
"""Of several forms: one input projection or two, MLPs without a module, names of the width, gates of their own."""


def tiny(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **FOUND.get(name, {}), **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_keeps_the_contract(name: str, tmp_path: Path) -> None:
    assert name not in FAMILIES
    model, tokens = tiny(name), tiny_tokens()
    mlps = find_mlps(model)
    assert [mlp.neurons for mlp in mlps] == [40] * 3
    family = family_of(model.config)
    assert family.detected
    assert getattr(model.config.get_text_config(), family.width) == 40
    values, expected = naive_sweep(model, tokens)
    ours, seen = chain_sweep(model, tokens, recompute=True)
    torch.testing.assert_close(ours, values, rtol=1e-10, atol=1e-12)
    for layer, pair in expected.items():
        for one, other in zip(seen[layer], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-13)
    plan = random_plan(model, 17)
    masked = masked_logits(model, plan, tokens)
    hp.cut_(model, plan)
    torch.testing.assert_close(logits_of(model, tokens), masked, rtol=1e-10, atol=1e-12)
    model.float().save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(logits_of(again, tokens), logits_of(model, tokens))


@pytest.mark.stopwatch
@pytest.mark.parametrize("name", FOUND)
def test_what_it_will_cost_is_tried(name: str, tmp_path: Path) -> None:
    tiny(name).float().save_pretrained(tmp_path)
    estimator = Estimator(find_checkpoint(str(tmp_path)), hp.ComputeConfig(device="cpu"))
    assert estimator.scoring([("hfprune", CriterionOptions())], 3, 20).seconds > 0


def test_what_sees_is_taken_for_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = tiny_config("llava").to_dict()
    sizes.pop("model_type")
    config = AutoConfig.for_model("llava_next", **sizes)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    assert family_of(config).takes_images
    hp.prune(str(tmp_path / "dense"), tmp_path / "out", hp.PruneConfig(hp.Budget(width=24), criterion="magnitude"))
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()
    words = ("prune", tmp_path / "dense", "--output", tmp_path / "no", "--width", 24, "--allocation", "global")
    refused(run(*words, "--criterion", "magnitude"), "vision-language models are saved with one width")


def test_the_whole_command_works_on_what_is_found(world: Path, tmp_path: Path) -> None:
    model = tiny("internlm3", vocab_size=VOCABULARY, max_position_embeddings=128).float()
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    text = ("--calibration", world / "calibration.txt", "--num-samples", 6, "--seq-len", 24)
    result = run("prune", tmp_path / "dense", "--output", tmp_path / "out", "--width", 24, *text)
    assert result.code == 0, result.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24
    words = ("prune", tmp_path / "dense", "--output", tmp_path / "streamed", "--width", 24, *text, "--stream")
    refused(run(*words), "its layout is proved with weights in memory only; leave out --stream")


@pytest.mark.parametrize(
    ("name", "options", "seen"),
    [
        ("mamba", {"state_size": 4}, "the first block holds"),
        (
            "granitemoe",
            {"intermediate_size": 40, "num_key_value_heads": 2},
            "the first block holds self_attn.q_proj 24 x 24",
        ),
        ("bitnet", {"intermediate_size": 40, "num_key_value_heads": 2}, "mlp.down_proj 24 x 40"),  # a norm of neurons
        (
            "qwen3_next",
            {"intermediate_size": 40, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48},
            "mlp.shared_expert looks like an MLP, but holds",
        ),
        ("mpt", {"d_model": 24, "n_heads": 4, "n_layers": 3}, "ffn.up_proj 96 x 24"),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_was_seen(name: str, options: dict[str, Any], seen: str) -> None:
    config = AutoConfig.for_model(name, **{**SIZES, **options})
    with pytest.raises(hp.UserError, match="is not in the table of families, and its MLPs could not be told") as error:
        family_of(config)
    assert seen in str(error.value)


def test_what_only_looks_like_an_mlp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons that are not each by itself: they write what their neighbours read too."""
    model = tiny("internlm3")
    state = {name: values.clone() for name, values in model.state_dict().items()}
    hp.score(model, tiny_tokens())
    kind = type(model.model.layers[0].mlp)
    plain = kind.forward

    def mixing(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)).roll(1, -1)) + plain(mlp, hidden)
        return added

    monkeypatch.setattr(kind, "forward", mixing)
    with pytest.raises(hp.UserError, match=r"layers.0.mlp looks like an MLP, but cutting half of it gives an output"):
        hp.score(model, tiny_tokens())
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert [mlp.neurons for mlp in find_mlps(model)] == [40] * 3
