"""Scoring that stops by itself: when it does, what it has then, and whether the extrapolation can be believed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hifiprune as hp
from hifiprune.config import CriterionOptions
from hifiprune.io.hashing import hash_tokens
from hifiprune.plan import Plan
from hifiprune.scores import Scores
from hifiprune.scoring.early_stopping import Stability, looks, overlap
from hifiprune.scoring.score import score_all
from tests.commands import Interruption, refused, run
from tests.families import tiny_model, tiny_tokens
from tests.test_resuming import equal, keeper_in, stopping_after

HALF = hp.Budget(width=20)


def scored(model: Any, windows: Any, stability: Stability | None = None, **how: Any) -> Scores:
    return score_all(model, windows, [("hfprune", CriterionOptions())], stability=stability, **how)[0]


@pytest.mark.parametrize(("batch_size", "first"), [(1, 8), (2, 8), (3, 12), (8, 16), (9, 18)])
def test_scores_that_stopped_early_are_those_of_the_windows_read(batch_size: int, first: int) -> None:
    model, windows = tiny_model("llama"), tiny_tokens(40, 9)
    stability = Stability(0.5, partial(hp.allocate, budget=HALF, round_to=1))
    early = scored(model, windows, stability, batch_size=batch_size)
    assert [look["windows"] for look in stability.curve] == [first]
    assert equal(early, scored(model, windows[:first], batch_size=batch_size))
    assert early.data_hash == hash_tokens(windows[:first])
    assert early.settings["windows"] == first
    assert early.settings["stability"] == stability.curve[-1]


def test_batches_that_do_not_divide_the_windows_are_no_trouble() -> None:
    for windows, batch_size in ((9, 2), (100, 32), (9, 8), (17, 16)):
        stability = Stability(0.999999, partial(hp.allocate, budget=HALF, round_to=1))
        scores = scored(tiny_model("llama"), tiny_tokens(windows, 9), stability, batch_size=batch_size)
        assert scores.settings["windows"] == windows
        assert "stability" not in scores.settings


def test_halves_are_those_of_every_other_window() -> None:
    model, windows = tiny_model("llama"), tiny_tokens(30, 9)
    stability = Stability(0.999999, partial(hp.allocate, budget=HALF, round_to=1))
    whole = scored(model, windows, stability)
    assert equal(whole, scored(model, windows)), "it went to the end"
    assert [look["windows"] for look in stability.curve] == [8, 10, 14, 18, 24]
    assert looks(30, 1) == [8, 10, 14, 18, 24]
    assert looks(100, 3) == [4, 6, 8, 10, 14, 18, 24, 30]
    assert looks(100, 32) == [2]

    def kept(first: int) -> Plan:
        alone = [scored(model, windows[number : number + 1]).values for number in range(first, 8, 2)]
        sums = [torch.stack(layer).sum(0) for layer in zip(*alone, strict=True)]
        return hp.allocate(replace(whole, values=sums), HALF, round_to=1)

    assert stability.curve[0]["halves"] == overlap(kept(0), kept(1))


def test_the_extrapolation_holds_for_noise_that_falls_with_the_root_of_the_windows() -> None:
    chance = torch.Generator().manual_seed(0)
    truth = torch.rand(20_000, generator=chance, dtype=torch.float64)
    budget, total = hp.Budget(width=16_000), 256
    draws = truth + 0.3 * torch.randn(total, len(truth), generator=chance, dtype=torch.float64)

    def scores(rows: torch.Tensor) -> Scores:
        return Scores([rows.mean(0).float()], ["mlp"], [3], 100_000, "noise", None, "", "")

    full = hp.allocate(scores(draws), budget, round_to=1)
    stability = Stability(0.9999, partial(hp.allocate, budget=budget, round_to=1))
    for windows in (38, 76, 120):

        def halves(rows: torch.Tensor = draws[:windows]) -> tuple[Scores, Scores]:
            return scores(rows[::2]), scores(rows[1::2])

        stability.settled(windows, total, halves)
    for look, windows in zip(stability.curve, (38, 76, 120), strict=True):
        true = overlap(hp.allocate(scores(draws[:windows]), budget, round_to=1), full)
        assert 1 - look["extrapolated"] == pytest.approx(1 - true, rel=0.1)
        assert 1 - look["halves"] > 1.5 * (1 - true), "or there was nothing to extrapolate"


def test_an_interrupted_run_stops_where_a_quiet_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.COST", float("inf"))
    model, windows = tiny_model("llama"), tiny_tokens(40, 9)
    wanted = 0.93
    quiet = Stability(wanted, partial(hp.allocate, budget=HALF, round_to=1))
    whole = scored(model, windows, quiet)
    read = whole.settings["windows"]
    assert 8 < read < 40, "neither at once nor never"
    for stop in (9, read - 1):
        again: dict[str, Any] = {
            "stability": Stability(wanted, partial(hp.allocate, budget=HALF, round_to=1)),
            "keeper": keeper_in(tmp_path / str(stop)),
        }
        with pytest.raises(Interruption), stopping_after(stop):
            scored(model, windows, **again)
        resumed = scored(model, windows, **again)
        assert equal(resumed, whole)
        assert resumed.settings == whole.settings
    known = scored(
        model,
        windows,
        Stability(wanted, partial(hp.allocate, budget=HALF, round_to=1)),
        keeper=keeper_in(tmp_path / "9"),
    )
    assert known.settings == whole.settings, "also once all was done"


def test_commands_stop_when_stable(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 30, "--seq-len", 24)
    words = ("score", world / "dense", *text, "--until-stable", 0.5)
    result = run(*words, "--ratio", 0.1, "--output", tmp_path / "scores", "--json")
    assert result.code == 0, result.err
    assert "Upper bound: scoring stops once 50% of the selection is stable." in " ".join(result.err.split())
    assert "8 of 30 windows: two halves agree on" in result.err
    assert [look["windows"] for look in result.json["results"]["stability"]] == [8]
    assert Scores.load(tmp_path / "scores").settings["windows"] == 8
    cut = ("prune", world / "dense", "--width", 24, *text)
    assert run(*cut, "--until-stable", 0.5, "--output", tmp_path / "cut").code == 0
    assert Scores.load(tmp_path / "cut" / "hifiprune" / "scores.safetensors").settings["windows"] == 8
    refused(run(*words, "--output", tmp_path / "out"), "until-stable and ratio go together")
    refused(run(*cut, "--until-stable", 1, "--output", tmp_path / "out"), "until-stable 1 must lie in (0, 1)")
    scored = run(*cut, "--until-stable", 0.9, "--scores", tmp_path / "scores", "--output", tmp_path / "out")
    refused(scored, "until-stable cannot be combined with --scores: drop one")
    two = run(*cut, "--until-stable", 0.9, "--criterion", "self-distillation", "--output", tmp_path / "out")
    refused(two, "until-stable watches one criterion that reads a text once, in one process")
