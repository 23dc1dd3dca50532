"""Pruning, then quantizing: torchao's int8 of a cut model is that model rounded, and is no input for another cut."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

import hifiprune as hp
from hifiprune.models.find_checkpoint import find_checkpoint
from tests.commands import refused, run

WIDTH = 24
TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def small(checkpoint: Path, text: Path, tmp_path: Path) -> Path:
    """The tiny model, cut and repaired by the command."""
    arguments = ("--width", WIDTH, "--round-to", 1, "--calibration", text, "--num-samples", 4, "--seq-len", 32)
    assert run("prune", checkpoint, "--output", tmp_path / "small", *arguments).code == 0
    return tmp_path / "small"


def load(folder: Path, config: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    how = {"quantization_config": TorchAoConfig(config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


def levels_by_hand(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -128 to 127 and a scale for each row; what lies between two of them goes to the nearer."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127), scale


def rounded_by_hand(model: Any) -> Any:
    """A model in float64 with the weights of its blocks' projections on those levels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            levels, scale = levels_by_hand(module.weight.data)
            module.weight.data = levels * scale
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits.double()
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - other).norm() / other.norm())


def test_int8_of_a_cut_model_rounds_its_weights_as_by_hand(small: Path) -> None:
    quantized, plain = load(small, Int8WeightOnlyConfig()), load(small, dtype=torch.float64)
    for layer, block in enumerate(quantized.model.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            theirs = getattr(block.mlp, name).weight
            weight = getattr(plain.model.layers[layer].mlp, name).weight.detach()
            levels, scale = levels_by_hand(weight)
            torch.testing.assert_close(theirs.scale.double(), scale, rtol=1e-6, atol=0)
            halfway = ((weight / scale).abs() % 1 - 0.5).abs() < 1e-4  # as a row's largest: either level is right
            assert halfway.sum() < 1.1 * len(weight)
            assert torch.equal(theirs.qdata.double()[~halfway], levels[~halfway])
            assert (theirs.qdata.double() - levels).abs().max() <= 1
            assert theirs.shape == weight.shape
            assert WIDTH in weight.shape


def test_int8_of_a_cut_model_computes_the_cut_model_within_its_own_error(small: Path) -> None:
    cut = logits(load(small, dtype=torch.float64))
    by_hand = logits(rounded_by_hand(load(small, dtype=torch.float64)))
    quantized = logits(load(small, Int8WeightOnlyConfig()))
    own_error = distance(by_hand, cut)
    assert 1e-3 < own_error < 0.1  # int8 changes something, and not much
    assert distance(quantized, cut) < 1.5 * own_error
    assert distance(quantized, by_hand) < 0.5 * own_error


def test_rounding_activations_too_adds_an_error_of_the_same_size(small: Path) -> None:
    cut = logits(load(small, dtype=torch.float64))
    own_error = distance(logits(rounded_by_hand(load(small, dtype=torch.float64))), cut)
    dynamic = distance(logits(load(small, Int8DynamicActivationInt8WeightConfig())), cut)
    assert own_error < dynamic < 5 * own_error


@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(),
        Int8DynamicActivationInt8WeightConfig(),
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8)),  # type: ignore[attr-defined]
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_is_saved_loads_again_and_is_refused_as_input(
    small: Path, checkpoint: Path, text: Path, tmp_path: Path, config: Any
) -> None:
    quantized, folder = load(small, config), tmp_path / "quantized"
    quantized.save_pretrained(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(quantized))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = file.get_tensor("model.layers.0.mlp.down_proj._weight_qdata")
    assert stored.dtype == torch.int8
    remedy = "is quantized (torchao) and cannot be cut; prune the original checkpoint and quantize the result"
    refused(run("inspect", folder), remedy)
    out = tmp_path / "out"
    refused(run("prune", folder, "--output", out, "--width", 8, "--calibration", text), remedy)
    refused(run("evaluate", folder, "--against", checkpoint, "--text", text, "--seq-len", 32), remedy)
    assert not out.exists()


def test_a_quantized_model_in_memory_can_be_measured_but_not_cut(small: Path, checkpoint: Path) -> None:
    quantized, dense = load(small, Int8WeightOnlyConfig()), find_checkpoint(str(checkpoint)).load()
    kl = hp.measure(quantized, TOKENS, dense)["kl"].value
    theirs, ours = logits(dense)[:, :-1].log_softmax(-1), logits(quantized)[:, :-1].log_softmax(-1)
    assert kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    message = r"is quantized \(model.layers.0.self_attn.q_proj.weight is a Int8Tensor.*prune the original model"
    with pytest.raises(hp.UserError, match=message):
        hp.score(quantized, TOKENS)
    plan = hp.allocate(hp.score(load(small), TOKENS), hp.Budget(width=8), round_to=1)
    with pytest.raises(hp.UserError, match=message):
        hp.cut_(quantized, plan)


def test_groups_that_do_not_divide_the_width(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the page on quantization warns of: one configuration fails, another leaves the weight as it is."""
    groups = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(small, groups)
    linear = nn.Linear(WIDTH, 16)
    with pytest.raises(AssertionError, match="to be divisible by block_size"):
        quantize_(linear, groups)
    with caplog.at_level(logging.INFO):
        quantize_(linear, Int4WeightOnlyConfig(group_size=32))
    assert type(linear.weight) is nn.Parameter


def test_the_code_of_the_page_runs(
    small: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "quantization.md").read_text()
    monkeypatch.chdir(tmp_path)
    checkpoint.rename("MODEL")
    text.rename("heldout.jsonl")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code.replace("heldout.txt", "heldout.jsonl").replace("seq_len=512", "seq_len=32"), names)
    again = AutoModelForCausalLM.from_pretrained("small-int8")
    assert torch.equal(logits(again), logits(names["quantized"]))
    assert names["metrics"]["kl"].value > 1e-3
    assert type(again.model.layers[0].mlp.down_proj.weight).__name__ == "Int8Tensor"
