"""Scores made in steps: what each step sees, plans within plans, and a model that is whole after."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.pruning.iterative import score_in_steps
from hifiprune.pruning.repair import cut_and_repair_, cut_and_repaired
from tests.commands import refused, run
from tests.families import tiny_model, tiny_tokens
from tests.test_cut import assert_unchanged, sizes_of, state_of
from tests.test_families import random_plan

TOKENS = tiny_tokens(9)
CRITERIA = ["entropy-square", "fisher", "self-distillation"]


def kept_of(plan: hp.Plan) -> list[set[int]]:
    return [set(kept.tolist()) for kept in plan.kept]


def by_hand(model: PreTrainedModel, criterion: str, widths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Score a copy, keep the best, repair; then score that, and so on: what is kept, and the last scores of it."""
    kept = [torch.arange(40)] * 3
    for width in widths:
        smaller = tiny_model("llama")
        if width < 40:
            names = [mlp.name for mlp in hp.find_mlps(smaller)]
            cut_and_repair_(smaller, hp.Plan(kept, [40] * 3, names, None, 0.0, 0, 0), TOKENS)
        values = hp.score(smaller, TOKENS, criterion).values
        following = widths[widths.index(width) + 1] if width != widths[-1] else width
        best = [each.topk(following).indices.sort().values for each in values]
        values = [each[chosen] for each, chosen in zip(values, best, strict=True)]
        kept = [before[chosen] for before, chosen in zip(kept, best, strict=True)]
    return kept, values


@pytest.mark.parametrize("criterion", CRITERIA)
def test_steps_are_cuts_repairs_and_scores_in_turn(criterion: str) -> None:
    model = tiny_model("llama")
    scores = score_in_steps(model, TOKENS, (criterion, hp.CriterionOptions()), hp.Budget(width=20), steps=3, round_to=1)
    kept, values = by_hand(model, criterion, [40, 33, 26])  # 20 neurons go in 3 steps, the first ones rounded up
    for ours, theirs, late in zip(scores.values, kept, values, strict=True):
        assert set(ours.topk(26).indices.tolist()) == set(theirs.tolist())
        torch.testing.assert_close(ours[theirs], late)
    assert scores.criterion == criterion
    assert scores.settings["steps"] == 3


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("allocation", ["uniform", "global", "searched"])
@pytest.mark.parametrize("repair", [True, False])
def test_plans_hold_each_other_and_the_model_is_whole_after(criterion: str, allocation: str, repair: bool) -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)
    sharing = hp.AllocationConfig(allocation, floor=0.3)
    request, budget = (criterion, hp.CriterionOptions()), hp.Budget(width=20)
    scores = score_in_steps(
        model, TOKENS, request, budget, steps=3, round_to=1, allocation=sharing, repair=repair, batch_size=2
    )
    assert_unchanged(model, state, sizes)
    assert scores.model_hash == hp.score(model, TOKENS).model_hash
    plans = [kept_of(hp.allocate(scores, hp.Budget(width=width), allocation=sharing)) for width in (33, 26, 20, 10)]
    for larger, smaller in pairwise(plans):
        assert all(small <= large for large, small in zip(larger, smaller, strict=True))
    once = hp.score(model, TOKENS, criterion)
    if allocation == "uniform":
        assert plans[0] == kept_of(hp.allocate(once, hp.Budget(width=33))), "the first step is that of plain scores"
    assert plans[2] != kept_of(hp.allocate(once, hp.Budget(width=20), allocation=sharing)), (
        "or there was no need of steps"
    )


def test_one_step_is_plain_scoring() -> None:
    model = tiny_model("llama")
    scores = score_in_steps(model, TOKENS, ("fisher", hp.CriterionOptions()), hp.Budget(width=20), steps=1)
    plain = hp.score(model, TOKENS, "fisher")
    assert all(torch.equal(one, other) for one, other in zip(scores.values, plain.values, strict=True))


@pytest.mark.parametrize("variant", ["llama-bias", "gemma2"])
def test_a_model_is_repaired_within_and_bitwise_whole_after(variant: str) -> None:
    model, for_good = tiny_model(variant), tiny_model(variant)
    state, sizes = state_of(model), sizes_of(model)
    plan = random_plan(model, 29)
    cut_and_repair_(for_good, plan, TOKENS)
    with cut_and_repaired(model, plan, TOKENS) as refits:
        assert len(refits) == 3
        assert_unchanged(model, state_of(for_good), sizes_of(for_good))
    assert_unchanged(model, state, sizes)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interruption_while_it_is_repaired_leaves_the_model_whole(
    stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)

    def interrupted(layers: range, what: str) -> Iterator[int]:
        yield from layers[:stop]
        raise KeyboardInterrupt

    monkeypatch.setattr("hifiprune.pruning.repair.track", interrupted)
    with pytest.raises(KeyboardInterrupt), cut_and_repaired(model, random_plan(model, 29), TOKENS):
        pytest.fail("the repair was not interrupted")
    assert_unchanged(model, state, sizes)


def test_the_command_takes_steps(world: Path, tmp_path: Path) -> None:
    start = ("prune", world / "dense", "--width", 20, "--num-samples", 9, "--seq-len", 24)
    text = ("--calibration", world / "calibration.txt")
    result = run(*start, *text, "--steps", 3, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert "Repeated for 3 rounds on shrinking models, with 2 repairs in between." in result.err
    assert result.json["results"]["scoring"]["steps"] == 3
    scores = hp.Scores.load(tmp_path / "out" / "hifiprune" / "scores.safetensors")
    assert sum(int((values < 0).sum()) for values in scores.values) == 3 * 14, "those who went on the way"
    refused(run(*start, *text, "--steps", 0, "--output", tmp_path / "no"), "steps 0 must be at least 1")
    data_free = (*start, "--criterion", "magnitude", "--steps", 2, "--output", tmp_path / "no")
    refused(run(*data_free), "2 steps need text to score on anew")
