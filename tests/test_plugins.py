"""Criteria of other packages: registered by a decorator, found by an entry point."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hifiprune as hp
from hifiprune.models.mlp import Mlp, find_mlps
from hifiprune.scoring.criteria import CRITERIA, load_plugins, register_criterion
from hifiprune.scoring.neuron_statistics import Sample, squared_mean_magnitude
from tests.commands import refused, run
from tests.families import tiny_model, tiny_tokens

MODULE = """
import hifiprune as hp

@hp.register_criterion("down-norm", "squared l2 norm of the outgoing weights; no data", "nowhere")
def down_norm(totals, mlp, sample):
    return mlp.output.weight.square().sum(0)
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)
    load_plugins.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that registers a criterion."""
    site = tmp_path / "site"
    (site / "plug-1.0.dist-info").mkdir(parents=True)
    (site / "plug_criteria.py").write_text(MODULE)
    (site / "plug-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (site / "plug-1.0.dist-info" / "entry_points.txt").write_text("[hifiprune.criteria]\nplug = plug_criteria\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(__import__("sys").modules, "plug_criteria", raising=False)
    load_plugins.cache_clear()
    return site


def test_an_installed_package_brings_a_criterion(installed: Path, world: Path, tmp_path: Path) -> None:
    words = ("prune", world / "dense", "--width", 24, "--round-to", 1, "--output", tmp_path / "out")
    result = run(*words, "--criterion", "down-norm")
    assert result.code == 0, result.err
    scores = load_file(tmp_path / "out" / "hifiprune" / "scores.safetensors")
    for layer in range(3):
        weight = load_file(world / "dense" / "model.safetensors")[f"model.layers.{layer}.mlp.down_proj.weight"]
        (found,) = (values for name, values in scores.items() if f"layers.{layer}." in name)
        torch.testing.assert_close(found, weight.square().sum(0))
    again = run(*words[:-1], tmp_path / "two", "--scores", tmp_path / "out" / "hifiprune" / "scores.safetensors")
    assert again.code == 0, again.err
    assert "down-norm" in run("criteria").out
    refused(run(*words[:-1], tmp_path / "no", "--criterion", "down-nrom"), "did you mean 'down-norm'?")


def test_a_package_that_cannot_be_imported_is_named(installed: Path, world: Path, tmp_path: Path) -> None:
    (installed / "plug_criteria.py").write_text("import nothing_of_this_name")
    refused(run("criteria"), "the criteria of plug_criteria cannot be imported (ModuleNotFoundError: ")
    words = ("prune", world / "dense", "--width", 24, "--output", tmp_path / "out", "--criterion", "magnitude")
    assert run(*words).code == 0, "those that are here need no package"


def test_a_registered_criterion_scores_text() -> None:
    @register_criterion("mean-magnitude", "mean over windows", statistic=squared_mean_magnitude)
    def mean_magnitude(totals: Tensor, mlp: Mlp, sample: Sample) -> Tensor:
        return (totals[0] / sample.windows).sqrt()

    model, tokens = tiny_model("llama"), tiny_tokens(4)
    ours, minitron = hp.score(model, tokens, "mean-magnitude"), hp.score(model, tokens, "minitron")
    for one, other in zip(ours.values, minitron.values, strict=True):
        torch.testing.assert_close(one, other / 2)
    assert len(ours.values) == len(find_mlps(model))


def test_names_and_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(hp.UserError, match="criterion 'fisher' is registered already"):
        register_criterion("fisher", "another")
    with pytest.raises(hp.UserError, match="has an objective, and nothing that is collected"):
        register_criterion("new", "another", objective=lambda options: ())
