"""What our functions say of their own accord: nothing of the libraries, whose settings stay as they were."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hifiprune as hp
from tests.commands import refused, run


def test_the_api_shows_no_bars_of_libraries_and_leaves_those_of_the_user(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.enable_progress_bar()
    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()
    calibration = hp.Calibration(str(world / "calibration.txt"), 3, 24)
    hp.prune(str(world / "dense"), tmp_path / "small", hp.PruneConfig(hp.Budget(width=24), calibration))
    assert capfd.readouterr().err == ""
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()) == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert "Loading weights" in capfd.readouterr().err, "the user's own bars are there"


def test_nothing_is_said_before_a_refusal(world: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """Notes wait until all checks have passed."""
    other, scores = make_checkpoint(initializer_range=0.1), tmp_path / "scores"
    assert run("score", other, "--output", scores, "--criterion", "magnitude").code == 0
    prune = ("prune", world / "dense", "--output", tmp_path / "small", "--ratio", 0.2, "--round-to", 1)
    short = ("--calibration", world / "calibration.txt", "--num-samples", 1000, "--seq-len", 64)
    for options, why in (
        ((), "criterion 'entropy-square' needs data"),
        (("--scores", scores, "--alpha", 0.5, "--num-samples", 8), "these scores belong to another model"),
        ((*short, "--floor", 0.5, "--batch-size", 2000), "too little text"),
    ):
        result = run(*prune, *options)
        refused(result, why)
        assert result.err.startswith("error: "), result.err
