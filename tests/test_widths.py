"""Widths that differ, by one threshold over all layers; presets, and settings without effect."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hifiprune as hp
from hifiprune.config import AllocationConfig
from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.pruning.allocate import allocate_widths
from tests.commands import Result, refused, run
from tests.families import tiny_tokens
from tests.naive import logits_of
from tests.test_allocation import make_scores


@given(
    gains=st.lists(st.lists(st.floats(0, 9), min_size=4, max_size=4), min_size=2, max_size=3),
    width=st.integers(1, 4),
    floor=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_shares_have_the_largest_sum_of_all(gains: list[list[float]], width: int, floor: float) -> None:
    total = width * len(gains)
    sums = [sorted(each, reverse=True) for each in gains]
    widths = allocate_widths([torch.tensor(each).double() for each in gains], width, round_to=1, floor=floor)
    least = max(1, int(floor * width))
    possible = [each for each in product(range(least, 5), repeat=len(gains)) if sum(each) == total]
    assert tuple(widths) in possible
    worth = [sum(sum(own[:width]) for own, width in zip(sums, each, strict=True)) for each in (widths, *possible)]
    assert worth[0] == pytest.approx(max(worth[1:]))


def test_a_global_threshold_keeps_the_highest_scores_of_all_layers() -> None:
    scores = make_scores()
    scores.values[1] *= 3
    plan = hp.allocate(scores, hp.Budget(width=20), round_to=1, allocation=AllocationConfig("global", floor=0.25))
    assert sum(plan.widths) == 60
    assert min(plan.widths) >= 5
    flat = torch.cat(scores.values).sort(descending=True).values
    expected = [int((values >= flat[59]).sum()) for values in scores.values]
    assert min(expected) >= 5, "the floor is not what decides"
    assert plan.widths == expected
    assert len(set(plan.widths)) > 1
    assert plan.parameters_after == plan.parameters_before - (3 * 64 - 60) * 30
    assert (
        hp.allocate(scores, hp.Budget(width=20), round_to=1, allocation=AllocationConfig("global", floor=1.0)).widths
        == [20] * 3
    )


def test_a_width_that_is_asked_for_is_the_exact_mean() -> None:
    scores = make_scores()
    scores.values[1] *= 3
    for width, round_to in ((20, 16), (32, 16), (20, 128)):
        plan = hp.allocate(
            scores, hp.Budget(width=width), round_to=round_to, allocation=AllocationConfig("global", floor=0.25)
        )
        assert sum(plan.widths) == 3 * width
        assert len(set(plan.widths)) > 1
        if width == 32:
            assert not any(each % 16 for each in plan.widths)


def test_rounded_widths_are_multiples_and_keep_the_budget() -> None:
    scores = make_scores()
    scores.values[1] *= 3
    plan = hp.allocate(scores, hp.Budget(neuron_ratio=0.5), round_to=16, allocation=AllocationConfig("global"))
    assert sum(plan.widths) == 96
    assert all(width % 16 == 0 and width >= 16 for width in plan.widths)
    assert plan.widths[1] == max(plan.widths) > 32


def prune(dense: Path, output: Path, *more: object) -> Result:
    return run("prune", dense, "--neuron-ratio", 0.4, "--round-to", 1, "--seq-len", 16, "--output", output, *more)


def test_the_command_writes_mixed_widths_that_load_with_and_without_us(world: Path, tmp_path: Path) -> None:
    dense, text, output = world / "dense", world / "calibration.txt", tmp_path / "out"
    more = ("--calibration", text, "--num-samples", 8, "--allocation", "global")
    result = prune(dense, output, *more, "--repair", "ridge", "--json")
    assert result.code == 0, result.err
    widths = json.loads((output / "config.json").read_text())["mlp_widths"]
    assert result.json["results"]["width"] == {"before": 40, "after": widths}
    assert result.json["results"]["criterion"] == "fisher"
    assert sum(widths) == 3 * 24
    assert len(set(widths)) > 1
    alone = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    ours = Checkpoint("pruned", output).load()
    torch.testing.assert_close(logits_of(alone, tiny_tokens()), logits_of(ours, tiny_tokens()))
    assert run("inspect", output, "--json").json["neurons_per_mlp"] == widths
    assert f"{min(widths)} to {max(widths)}" in run("inspect", output).out
    measured = run("evaluate", output, "--against", dense, "--text", world / "held.txt", "--seq-len", 16, "--json")
    assert measured.code == 0, measured.err
    refused(
        prune(output, tmp_path / "again", "--calibration", text), "a budget needs equal ones: prune the dense model"
    )
    second = prune(dense, tmp_path / "two", *more, "--repair", "ridge")
    assert "24" in second.err
    plans = [(folder / "hifiprune" / "plan.json").read_bytes() for folder in (output, tmp_path / "two")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("preset", "repair", "flags"),
    [
        ("hfprune", "none", ("--criterion", "hfprune", "--round-to", 1)),
        ("sdmprune", "none", ("--criterion", "self-distillation", "--round-to", 1)),
        ("default", "ridge", ("--criterion", DEFAULT_CRITERION, "--round-to", 128, "--allocation", "uniform")),
    ],
)
def test_presets_are_what_their_flags_say(
    world: Path, tmp_path: Path, preset: str, repair: str, flags: tuple[object, ...]
) -> None:
    plans = []
    for name, more in (("preset", ("--preset", preset)), ("flags", (*flags, "--repair", repair))):
        start = ("prune", world / "dense", "--width", 21, "--calibration", world / "calibration.txt", "--seq-len", 16)
        result = run(*start, "--num-samples", 4, "--output", tmp_path / name, *more)
        assert result.code == 0, result.err
        plans.append((tmp_path / name / "hifiprune" / "plan.json").read_bytes())
        arguments = json.loads((tmp_path / name / "run.json").read_text())["arguments"]
        assert arguments["repair"] == repair
    assert plans[0] == plans[1]
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("preset", "flags"))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_what_was_asked_for_is_what_scores_were_made_by(world: Path, tmp_path: Path) -> None:
    dense = world / "dense"
    assert prune(dense, tmp_path / "one", "--criterion", "random").code == 0
    scores = ("--scores", tmp_path / "one" / "hifiprune" / "scores.safetensors")
    for flags, name in ((("--preset", "hfprune"), "hfprune"), (("--criterion", "magnitude"), "magnitude")):
        refused(prune(dense, tmp_path / "two", *scores, *flags), f"made by 'random', and '{name}' is asked for")
    assert prune(dense, tmp_path / "two", *scores, "--criterion", "random").code == 0


def test_settings_without_effect_are_told(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4)
    result = prune(world / "dense", tmp_path / "a", *text, "--alpha", 0.3, "--floor", 0.1)
    assert "Unused with criterion 'entropy-square' and uniform allocation: alpha, floor." in result.err
    used = ("--criterion", "fisher", "--label-samples", 2, "--allocation", "global", "--floor", 0.1)
    result = prune(world / "dense", tmp_path / "b", *text, *used)
    assert result.code == 0, result.err
    assert "Unused with" not in result.err
    result = prune(world / "dense", tmp_path / "c", *text, "--criterion", "magnitude", "--repair", "none")
    assert "--calibration is ignored" in result.err
    assert json.loads((tmp_path / "c" / "run.json").read_text())["arguments"]["calibration"] is None
    refused(prune(world / "dense", tmp_path / "d", *text, "--repair", "rigde"), "did you mean 'ridge'?")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--allocation", "golbal"), "allocation 'golbal' is not known; known are uniform, global; did you mean"),
        (("--allocation", "searched"), "allocation 'searched' is not known; known are uniform, global"),
        (("--steps", 2), "there is no option --steps"),
        (("--criterion", "obs"), "criterion 'obs' is not known; known are hfprune,"),
        (("--criterion", "self-distillation-square"), "is not known; known are hfprune,"),
        (("--allocation", "global", "--floor", 1.5), "floor 1.5 must lie in [0, 1]"),
        (("--preset", "hfprun"), "preset 'hfprun' is not known; known are default, hfprune, sdmprune; did you mean"),
    ],
)
def test_impossible_allocations_are_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    refused(prune(world / "dense", tmp_path / "out", "--calibration", world / "calibration.txt", *flags), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("criterion", "said"), [("random", True), ("magnitude", False)])
def test_a_threshold_over_scores_of_no_common_scale_is_remarked_on(
    world: Path, tmp_path: Path, criterion: str, said: bool
) -> None:
    result = prune(world / "dense", tmp_path / "out", "--criterion", criterion, "--allocation", "global")
    assert result.code == 0, result.err
    assert ("not on one scale" in result.err) == said
