"""Models with experts: repaired expert by expert, read from files of either form, cut to one width by commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hifiprune as hp
from hifiprune.io.hashing import hash_model
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.plan import ModelShape, proportional_width
from hifiprune.pruning.cut_checkpoint import cut_checkpoint, hash_stored, stored_plainly
from hifiprune.pruning.repair import HELD_OUT, cut_and_repair_
from tests.commands import refused, run
from tests.conftest import save_checkpoint
from tests.families import ROUTED, load, tiny_model, tiny_tokens
from tests.naive import logits_of, masked_logits, recorded_activations
from tests.test_families import random_plan
from tests.test_repair import ridge

WINDOWS = 24


@pytest.mark.parametrize("variant", ROUTED)
def test_every_expert_is_refitted_to_what_it_wrote_by_itself(variant: str) -> None:
    model, tokens = tiny_model(variant), tiny_tokens(WINDOWS)
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: states.append(output.detach().flatten(0, 1)))
        for block in model.model.layers
    ]
    with recorded_activations(model) as activations, torch.no_grad():
        logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    mlps, plan = find_mlps(model), random_plan(model, 29)
    before = [mlp.output.weight.detach().clone() for mlp in mlps]
    refits = cut_and_repair_(model, plan, tokens, batch_size=5).refits
    assert [refit.name for refit in refits] == [mlp.name for mlp in mlps]
    solved = 0
    for mlp, weight, activation, kept, refit in zip(mlps, before, activations, plan.kept, refits, strict=True):
        if refit.damping is None:
            assert torch.equal(mlp.output.weight, weight[:, kept])
            continue
        solved += 1
        rest = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, kept, False)
        rows = activation.flatten(0, -2)
        scale = states[mlp.block].square().mean(-1, keepdim=True).rsqrt()
        change = ridge(rows[:, kept], rows[:, rest] @ weight[:, rest].T, scale, refit.damping)
        torch.testing.assert_close(mlp.output.weight, weight[:, kept] + change, rtol=1e-6, atol=1e-8)
        assert refit.error < refit.plain_error
    assert solved > len(mlps) // 2, "or there was little to check"


def test_an_expert_that_saw_too_little_stays_as_it_is() -> None:
    model, tokens = tiny_model("mixtral"), tiny_tokens(HELD_OUT)
    model.model.layers[1].mlp.gate.weight.data[0] = 0  # the router of one block never chooses its first expert
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda _, __, out: (out[0], out[1], torch.where(out[2] == 0, 1 + (out[2].flip(-1) == 1).long(), out[2]))
    )
    plan = random_plan(model, 30)
    first = next(number for number, mlp in enumerate(find_mlps(model)) if mlp.name.endswith("1.mlp.experts.0"))
    weight = find_mlps(model)[first].output.weight.detach().clone()
    refit = cut_and_repair_(model, plan, tokens).refits[first]
    assert refit.damping is None
    assert torch.equal(find_mlps(model)[first].output.weight, weight[:, plan.kept[first]])


def stack(folder: Path) -> None:
    """Store the experts of a checkpoint as the model has them, in two tensors a block."""
    tensors = load_file(folder / "model.safetensors")
    model = load(folder)
    stacked = {name: values.contiguous() for name, values in model.state_dict().items() if "experts." in name}
    ours = {name for name in stacked if "shared" not in name}
    others = {name: values for name, values in tensors.items() if ".experts." not in name}
    save_file(others | {name: stacked[name] for name in ours}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2"])
def test_experts_may_be_stored_in_one_tensor(
    variant: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint(family=variant)
    apart = find_checkpoint(str(path))
    model = apart.load()
    assert any(".experts.3.up_proj" in name for name in load_file(path / "model.safetensors"))
    assert hash_stored(apart) == hash_model(model)
    stack(path)
    checkpoint = find_checkpoint(str(path))
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(path / "model.safetensors"))
    assert stored_plainly(checkpoint)
    assert hash_stored(checkpoint) == hash_model(model)
    plan = random_plan(model, 24)
    cut_checkpoint(str(path), tmp_path / "cut", plan)
    expected = masked_logits(model, plan, tiny_tokens())
    loaded = load(tmp_path / "cut")
    torch.testing.assert_close(logits_of(loaded, tiny_tokens()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["--stream"], ["--criterion", "self-distillation", "--repair", "none"]])
@pytest.mark.parametrize("variant", ROUTED)
def test_the_command_cuts_every_expert_to_one_width(variant: str, more: list[str], world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", variant, max_position_embeddings=128)
    text = ("--calibration", world / "calibration.txt", "--num-samples", 8, "--seq-len", 24)
    result = run("prune", dense, "--output", tmp_path / "out", "--neuron-ratio", 0.4, "--round-to", 8, *text, *more)
    assert result.code == 0, result.err
    model: Any = load(tmp_path / "out")
    plan = hp.Plan.load(tmp_path / "out" / "hifiprune" / "plan.json")
    assert [mlp.neurons for mlp in find_mlps(model)] == plan.widths
    assert {mlp.neurons for mlp in find_mlps(model) if mlp.is_expert} == {24}
    scores = hp.Scores.load(tmp_path / "out" / "hifiprune" / "scores.safetensors")
    for values, kept in zip(scores.values, plan.kept, strict=True):  # of each expert its own best
        assert values[kept].min() >= values.sort(descending=True).values[len(kept) - 1]
    total = sum(values.numel() for values in load_file(tmp_path / "out" / "model.safetensors").values())
    assert total == plan.parameters_after
    if "--repair" in more:
        expected = masked_logits(load(dense), plan, tiny_tokens())
        torch.testing.assert_close(logits_of(model, tiny_tokens()), expected, rtol=1e-4, atol=1e-5)
    assert model.generate(tiny_tokens(1), max_new_tokens=3, do_sample=False).shape[1] > tiny_tokens().shape[1]


def test_experts_that_saw_nothing_are_counted(world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "mixtral")
    words = ("--calibration", world / "calibration.txt", "--num-samples", 1, "--criterion", "hfprune")
    few = run("score", dense, "--output", tmp_path / "few", *words, "--seq-len", 2)
    assert few.code == 0, few.err
    scores = hp.Scores.load(tmp_path / "few")
    unseen = sum(bool((values == 0).all()) for values in scores.values)
    assert unseen >= 3, "two tokens go to four of five experts at most"
    assert f"{unseen} of 15 experts received no calibration tokens" in few.err
    many = run("score", dense, "--output", tmp_path / "many", *words, "--seq-len", 60)
    assert "received no calibration tokens" not in many.err


def test_experts_that_would_differ_in_width_are_refused(world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "mixtral", max_position_embeddings=128)
    text = ("--calibration", world / "calibration.txt", "--num-samples", 8, "--seq-len", 24)
    words = ("prune", dense, "--output", tmp_path / "out", "--allocation", "global", *text)
    refused(
        run(*words, "--width", 24),
        "experts have one width, which the configuration states for all",
    )
    odd = ("prune", dense, "--output", tmp_path / "out", "--width", 30, *text)
    refused(
        run(*odd), "width 30 of experts must be a multiple of 8, as grouped matrix products want it; use --round-to"
    )
    model = tiny_model("mixtral")
    plan = random_plan(model, 24)
    plan.kept[2] = plan.kept[2][:-1]
    with pytest.raises(hp.UserError, match="one configuration holds one width"):
        hp.cut_(model, plan)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pruned_model_with_experts_is_trained(method: str, world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "qwen2_moe", max_position_embeddings=128)
    hp.prune(str(dense), tmp_path / "small", hp.PruneConfig(hp.Budget(width=24), criterion="magnitude"))
    words = ("--data", world / "calibration.txt", "--max-steps", 4, "--seq-len", 24, "--output", tmp_path / "out")
    how = ("--method", method, "--distill-weight", 0)  # the dense model itself is random
    result = run("recover", tmp_path / "small", *words, *how)
    assert result.code == 0, result.err
    before, after = (load(tmp_path / name) for name in ("small", "out"))
    assert type(after) is type(before)
    assert [mlp.neurons for mlp in find_mlps(after)] == [mlp.neurons for mlp in find_mlps(before)]
    trained = json.loads((tmp_path / "out" / "run.json").read_text())["results"]["held_out_perplexity"]
    assert trained["after"] < trained["before"]
    kept, name = dict(before.named_parameters()), "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(dict(after.named_parameters())[name], kept[name]) == (method == "lora")


def test_layers_that_predict_further_tokens_are_not_stated(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "glm4_moe", num_mtp_layers=1)
    hp.prune(str(dense), tmp_path / "out", hp.PruneConfig(hp.Budget(width=24), criterion="magnitude"))
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any("layers.3" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert not stated.get("num_mtp_layers")
    assert not stated.get("num_nextn_predict_layers")


def test_other_mlps_follow_the_experts() -> None:
    shape = ModelShape.from_sizes(
        [(1408, 6144)] * 26 * 64 + [(2816, 6144)] * 26 + [(10944, 6144)], 10**10, experts=True
    )
    width = shape.width_at(hp.Budget(neuron_ratio=0.2), 128)
    assert width == 1152  # the nearest multiple of 128 to 1126.4
    assert shape.width_of(2816, width) == 2 * width, "two shared experts are twice as wide, as the configuration says"
    assert shape.width_of(10944, width) == 8960  # the nearest multiple of 128 to 8954.2
    gone = 26 * 64 * 256 + 26 * 512 + 1984
    assert shape.ratio_at(width) == pytest.approx(gone * 6144 / 10**10, rel=1e-12)
    assert proportional_width(7, 40, 60) == 11  # 10.5, and half is rounded up
    with pytest.raises(hp.UserError, match="the MLPs differ in neurons, 40 to 60"):
        ModelShape.from_sizes([(40, 3), (60, 3)], 1000)
