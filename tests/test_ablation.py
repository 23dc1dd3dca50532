"""`ablate`: divergences against naive float64 ones, its sample, its rank correlations, and its command line."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hifiprune as hp
from hifiprune.commands import ablate
from hifiprune.commands.ablate import Bench, sample
from hifiprune.config import CriterionOptions
from hifiprune.engine.divergence import small_divergence
from hifiprune.engine.lm_head import Head
from hifiprune.evaluation.ranks import correlation, spearman
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.reports import plots
from hifiprune.study_results import AblateResults
from tests.commands import Interruption, Result, refused, run
from tests.conftest import byte_tokenizer, save_checkpoint
from tests.families import tiny_model, tiny_tokens

SIZES = ("--neurons", 20, "--groups", 8, "--group-size", 4, "--seq-len", 24, "--max-windows", 2)
Record = dict[str, Any]
Array = np.ndarray[Any, Any]


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that plots take."""
    monkeypatch.setattr(plots, "draw_ablation", lambda *_: None)


def tokens_of(text: Path, positions: int, windows: int) -> Tensor:
    ids = byte_tokenizer()(text.read_text())["input_ids"]
    return torch.tensor(ids[: positions * windows]).view(windows, positions)


@torch.no_grad()
def true_divergence(model: PreTrainedModel, tokens: Tensor, layer: int, neurons: list[int]) -> float:
    """Mean KL(dense || pruned) of the plain model with these activations set to zero by a hook, naively."""

    def zeroed(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activation = arguments[0].clone()
        activation[..., neurons] = 0
        return (activation,)

    dense = model(input_ids=tokens, use_cache=False).logits.softmax(-1)
    linear = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    handle = linear.register_forward_pre_hook(zeroed)
    pruned = model(input_ids=tokens, use_cache=False).logits.softmax(-1)
    handle.remove()
    assert dense.dtype == torch.float64
    return float((dense * (dense.log() - pruned.log())).sum(-1).mean())


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scores of the tiny model; `kl`, called minitron, are the true divergences of every neuron."""
    folder, dense = tmp_path_factory.mktemp("scored"), str(world / "dense")
    calibration = hp.Calibration(str(world / "calibration.txt"), 3, 24)
    for criterion in ("fisher", "flap", "random"):
        hp.score_checkpoint(dense, folder / criterion, hp.ScoreConfig(calibration, criterion=criterion))
    hp.score_checkpoint(dense, folder / "another", hp.ScoreConfig(criterion="random", options=CriterionOptions(seed=1)))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    tokens, scores = tokens_of(world / "held.txt", 24, 2), hp.Scores.load(folder / "random")
    values = [
        torch.tensor([true_divergence(model, tokens, layer, [neuron]) for neuron in range(40)]).float()
        for layer in range(3)
    ]
    replace(scores, criterion="minitron", values=values).save(folder / "kl")
    replace(scores, values=[layer * float("nan") for layer in values]).save(folder / "broken")
    return folder


def command(world: Path, scored: Path, output: Path, *names: str) -> list[object]:
    files = [word for name in names or ("fisher", "flap") for word in ("--scores", scored / name)]
    return ["ablate", world / "dense", "--output", output, *files, "--text", world / "held.txt", *SIZES]


@pytest.fixture(scope="module")
def finished(world: Path, scored: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("finished") / "abla ted"
    result = run(*command(world, scored, folder), "--dtype", "float64")
    assert result.code == 0, result.err
    return result, folder


def read(folder: Path) -> Record:
    results: Record = json.loads((folder / "ablate.json").read_text())["results"]
    return results


def test_the_folder_holds_the_record_and_plots(finished: tuple[Result, Path]) -> None:
    folder = finished[1]
    drawn = [f"ablation-{kind}" for kind in ("single", "groups")]
    assert {path.name for path in folder.iterdir()} == {
        ".hifiprune.json",
        "ablate.json",
        *(f"{name}.{kind}" for name in drawn for kind in ("png", "svg")),
    }
    for name in drawn:
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 10
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert [path.name for path in folder.parent.iterdir()] == ["abla ted"]


def test_the_table_shows_each_criterion_and_what_to_do_next(finished: tuple[Result, Path], tmp_path: Path) -> None:
    result, folder = finished
    lines = result.out.splitlines()
    correlations = read(folder)["correlations"]
    for name in ("fisher", "flap"):
        (row,) = [line for line in lines if line[:1] in "│|" and f" {name} " in line]
        assert f"{correlations[name]['single']['within_layers']['value']:.3g}" in row
    words = shlex.split(lines[-1].removeprefix("Next: hifiprune "))
    best = max(correlations, key=lambda name: correlations[name]["single"]["within_layers"]["value"] or -1)
    assert hp.Scores.load(words[words.index("--scores") + 1]).criterion == best
    pruned = run(*words[:-1], tmp_path / "small", "--json")
    assert pruned.code == 0, pruned.err


@pytest.mark.usefixtures("no_plots")
def test_json_is_one_object_on_one_line(world: Path, scored: Path, tmp_path: Path) -> None:
    result = run(*command(world, scored, tmp_path / "out"), "--neurons", 3, "--groups", 0, "--json")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    assert result.json == json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert list(result.json["results"]["correlations"]["fisher"]) == ["single"]


def test_plots_show_the_trials(finished: tuple[Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.update({path.name: figure}))
    results = read(finished[1])
    plots.draw_ablation(TypeAdapter(AblateResults).validate_python(results), tmp_path)
    assert list(figures) == ["ablation-single", "ablation-groups"]
    for kind, figure in figures.items():
        trials = [t for t in results["trials"] if (len(t["neurons"]) == 1) == (kind == "ablation-single")]
        for axes, name in zip(figure.axes, ("fisher", "flap"), strict=False):
            points = [(trial["scores"][name], trial["kl"]) for trial in trials]
            np.testing.assert_allclose(axes.collections[0].get_offsets(), points)
            assert list(axes.collections[0].get_array()) == [trial["layer"] for trial in trials]
            assert axes.get_title().startswith(f"{name}: ")
        assert [axes.get_xscale() for axes in figure.axes[:2]] == ["log", "linear"], "flap's are negative too"


def test_every_trial_is_the_true_divergence(world: Path, scored: Path, finished: tuple[Result, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "dense", dtype=torch.float64)
    tokens, trials = tokens_of(world / "held.txt", 24, 2), read(finished[1])["trials"]
    files = {name: hp.Scores.load(scored / name) for name in ("fisher", "flap")}
    assert [len(trial["neurons"]) for trial in trials] == [1] * 20 + [4] * 8
    for trial in trials:
        expected = true_divergence(model, tokens, trial["layer"], trial["neurons"])
        assert trial["kl"] == pytest.approx(expected, rel=1e-6)
        assert expected > 0
        for name, scores in files.items():
            own = sum(float(scores.values[trial["layer"]][neuron]) for neuron in trial["neurons"])
            assert trial["scores"][name] == pytest.approx(own, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "qwen3", "olmo2"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_divergences_of_every_layer_and_family(family: str, batch_size: int) -> None:
    model, tokens = tiny_model(family), tiny_tokens(windows=3)
    model.train()
    bench = Bench(model, tokens, {0, 1, 2}, batch_size)
    found = [bench.divergence(trial) for trial in ((0, (3,)), (1, (0, 39)), (2, tuple(range(20))))]
    assert model.training
    model.eval()
    for kl, (layer, neurons) in zip(found, [(0, [3]), (1, [0, 39]), (2, list(range(20)))], strict=True):
        assert kl == pytest.approx(true_divergence(model, tokens, layer, neurons), rel=1e-6, abs=1e-13)


def test_a_neuron_that_writes_nothing_does_no_damage() -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        find_mlps(model)[1].output.weight[:, 5] = 0
    bench = Bench(model, tiny_tokens(), {1}, 2)
    assert bench.divergence((1, (5,))) == 0
    assert bench.divergence((1, (6,))) > 0


def naive(dense: Tensor, pruned: Tensor) -> Tensor:
    return (dense.softmax(-1) * (dense.log_softmax(-1) - pruned.log_softmax(-1))).sum(-1).flatten()


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_divergences_of_near_states_keep_the_digits_that_the_naive_formula_loses(distance: float) -> None:
    torch.manual_seed(0)
    head = Head(nn.Linear(16, 3000))
    dense = torch.randn(2, 700, 16)
    pruned = dense + distance * torch.randn_like(dense)
    with torch.no_grad():
        logits = [
            states.double() @ head.linear.weight.double().T + head.linear.bias.double() for states in (dense, pruned)
        ]
        truth = naive(*logits)
        found = small_divergence(dense, pruned, head)
        ours, theirs = ((each.double() - truth).abs().mean() for each in (found, naive(*(x.float() for x in logits))))
    assert found.dtype == torch.float64
    assert bool((found >= 0).all())
    assert ours < 0.02 * truth.mean()
    assert ours < theirs / 20


IDENTITY = {size: Head(nn.Linear(size, size, bias=False)) for size in (2, 3, 40)}
for _head in IDENTITY.values():
    nn.init.eye_(_head.linear.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1000.0])
def test_divergences_of_far_distributions(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    dense, pruned = (scale * torch.randn(1, 300, 40, dtype=dtype) for _ in range(2))
    torch.testing.assert_close(
        small_divergence(dense, pruned, IDENTITY[40]), naive(dense.double(), pruned.double()), rtol=2e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    ("dense", "pruned"),
    [
        ([0.0, -100.0, -200.0], [0.0, -7.0, -200.0]),  # what p lacks has all of the divergence
        ([0.0, -200.0, -200.0], [-200.0, 0.0, -200.0]),
        ([0.0, -90.0, -3.0], [0.0, -5.0, -3.0]),
        ([0.0, -85.0, -85.0], [-85.0, 0.0, 0.0]),
        ([0.0, -30.0, -2.0], [0.0, -9.0, -2.0]),
        ([0.0, -400.0, 0.0], [0.0, -350.0, 0.0]),
    ],
)
def test_divergences_where_probabilities_underflow(dense: list[float], pruned: list[float]) -> None:
    pair = torch.tensor(dense)[None, None], torch.tensor(pruned)[None, None]
    found = small_divergence(*pair, IDENTITY[3])
    torch.testing.assert_close(found, naive(*(each.double() for each in pair)), rtol=1e-5, atol=1e-12)


def random_scores(layers: int, width: int, seed: int = 0) -> hp.Scores:
    chance = torch.Generator().manual_seed(seed)
    values = [torch.rand(width, generator=chance) for _ in range(layers)]
    return hp.Scores(values, [f"mlp.{i}" for i in range(layers)], [3] * layers, 99, "random", None, "model", "data")


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_the_sample_is_what_was_asked_for(data: st.DataObject) -> None:
    layers, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 70))
    neurons = data.draw(st.integers(1, layers * width))
    groups, size = data.draw(st.integers(0, 20)), data.draw(st.integers(2, width))
    seed = data.draw(st.integers(0, 2**32 - 1))
    scores = random_scores(layers, width)
    trials = sample(scores, neurons, groups, size, seed)
    assert trials == sample(scores, neurons, groups, size, seed)
    single, grouped = trials[:neurons], trials[neurons:]
    assert len(grouped) == groups
    assert len(set(single)) == neurons, "each neuron is tried once"
    for layer, members in trials:
        assert 0 <= layer < layers
        assert 0 <= min(members) <= max(members) < width
        assert list(members) == sorted(set(members))
    assert all(len(members) == 1 for _, members in single)
    assert all(len(members) == size for _, members in grouped)
    used = sorted({layer for layer, _ in single})
    counts = [sum(layer == each for layer, _ in single) for each in used]
    assert max(counts) - min(counts) <= 1
    assert len(used) == min(layers, -(-neurons // min(16, width)))
    gaps = np.diff(used)
    if len(used) > 1:
        assert (used[0], used[-1]) == (0, layers - 1)
        assert gaps.max() - gaps.min() <= 1
    assert {layer for layer, _ in grouped} <= set(used)
    for layer, count in zip(used, counts, strict=True):
        order = scores.values[layer].argsort().tolist()
        ranks = sorted(order.index(members[0]) for at, members in single if at == layer)
        for place, rank in enumerate(ranks):
            assert int(place * width / count) <= rank < (place + 1) * width / count, "a rank in each stratum"


def test_the_sample_follows_the_seed() -> None:
    scores = random_scores(4, 40)
    first, second = (sample(scores, 20, 5, 3, seed) for seed in (0, 1))
    assert first != second
    assert first[20:] != second[20:]
    assert len(set(first[20:])) == 5


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((121, 0, 50), "neurons 121 is more than the model's 3 layers of 40; try fewer"),
        ((1, 1, 41), "group-size 41 is more than the 40 neurons of a layer"),
    ],
)
def test_impossible_samples_are_refused(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(hp.UserError, match=message):
        sample(random_scores(3, 40), *numbers, seed=0)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-9, 9)), min_size=3, max_size=30))
def test_rank_correlation_is_scipys_also_with_ties(pairs: list[tuple[int, int]]) -> None:
    first, second = torch.tensor(pairs, dtype=torch.float32).T
    found = float(spearman(first, second))
    if len(set(first.tolist())) == 1 or len(set(second.tolist())) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


def test_rank_correlation_of_many_rows_at_once() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 20), torch.randn(5, 20).exp()
    expected = [spearmanr(one, two).statistic for one, two in zip(first, second, strict=True)]
    assert spearman(first, second).tolist() == pytest.approx(expected)


def ranks(values: Array) -> Array:
    """Mean ranks along the last dimension."""
    below = (values[..., None] > values[..., None, :]).sum(-1)
    equal = (values[..., None] == values[..., None, :]).sum(-1)
    return np.asarray(below + (equal + 1) / 2)


def pearson(first: Array, second: Array) -> Array:
    centred = [each - each.mean(-1, keepdims=True) for each in (first, second)]
    norms = [np.sqrt((each**2).sum(-1)) for each in centred]
    with np.errstate(invalid="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(-1) / (norms[0] * norms[1]))


def test_correlation_within_layers_is_the_mean_of_each_layers() -> None:
    chance = np.random.default_rng(0)
    strata = [2] * 15 + [0] * 9 + [5] * 12 + [7] * 2  # two members have no correlation
    scores, noise = chance.normal(size=38), chance.normal(size=38)
    truth = scores * np.repeat([1, -1, 1, 1], [15, 9, 12, 2]) + noise + np.repeat([0, 100, -50, 7], [15, 9, 12, 2])
    scores += np.repeat([0, 30, 90, 0], [15, 9, 12, 2])
    found = correlation(torch.tensor(scores), torch.tensor(truth), strata)
    parts = [np.flatnonzero(np.array(strata) == stratum) for stratum in (0, 2, 5)]
    assert found.value == pytest.approx(np.mean([pearson(ranks(scores[part]), ranks(truth[part])) for part in parts]))
    drawn = [chance.choice(part, size=(8000, len(part))) for part in parts]
    means = np.nanmean([pearson(ranks(scores[each]), ranks(truth[each])) for each in drawn], 0)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.06 * (high - low))
    assert found.high == pytest.approx(high, abs=0.06 * (high - low))
    everywhere = correlation(torch.tensor(scores), torch.tensor(truth), [0] * 38)
    assert everywhere.value == pytest.approx(pearson(ranks(scores), ranks(truth)))
    assert everywhere.value != pytest.approx(found.value, abs=0.1)


def test_the_correlations_follow_from_the_trials(finished: tuple[Result, Path]) -> None:
    results = read(finished[1])
    for kind, trials in (("single", results["trials"][:20]), ("groups", results["trials"][20:])):
        layers = np.array([trial["layer"] for trial in trials])
        assert len(set(layers)) == 2
        truth = np.array([trial["kl"] for trial in trials])
        for name in ("fisher", "flap"):
            scores = np.array([trial["scores"][name] for trial in trials])
            found = results["correlations"][name][kind]
            parts = [pearson(ranks(scores[layers == each]), ranks(truth[layers == each])) for each in set(layers)]
            assert found["all_layers"]["value"] == pytest.approx(pearson(ranks(scores), ranks(truth)))
            assert found["within_layers"]["value"] == pytest.approx(np.mean(parts))
            assert found["within_layers"]["value"] != pytest.approx(found["all_layers"]["value"], abs=1e-3)


def test_layers_without_a_correlation_do_not_count() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    truth = torch.tensor([2.0, 3.0, 4.0, 1.0, 2.0, 3.0])
    assert correlation(scores, truth, [0, 0, 0, 1, 1, 1]).value == pytest.approx(1)
    assert np.isnan(correlation(scores, truth, [0, 0, 1, 1, 2, 2]).value)


def test_where_there_is_no_correlation_there_is_no_number(world: Path, scored: Path, tmp_path: Path) -> None:
    scores = hp.Scores.load(scored / "random")
    replace(scores, criterion="ppm", values=[torch.ones(40) for _ in range(3)]).save(tmp_path / "same")
    words = (*command(world, scored, tmp_path / "out", "random"), "--scores", tmp_path / "same")
    result = run(*words, "--neurons", 40, "--groups", 4)  # in three layers: two groups in one at most
    assert result.code == 0, result.err
    (row,) = [line for line in result.out.splitlines() if " ppm " in line]
    assert row.count(" none ") == 4
    assert "nan" not in result.out
    record = json.loads((tmp_path / "out" / "ablate.json").read_text(), parse_constant=pytest.fail)
    found = record["results"]["correlations"]
    nothing = {"value": None, "low": None, "high": None}
    assert found["random"]["groups"]["within_layers"] == nothing
    assert found["random"]["groups"]["all_layers"]["value"] is not None
    assert found["ppm"] == {kind: {"all_layers": nothing, "within_layers": nothing} for kind in ("single", "groups")}


@pytest.mark.usefixtures("no_plots")
def test_the_true_divergence_ranks_perfectly_and_noise_does_not(world: Path, scored: Path, tmp_path: Path) -> None:
    """Also that a criterion may have the name of a figure."""
    numbers = ("--neurons", 120, "--groups", 12, "--group-size", 5)
    result = run(*command(world, scored, tmp_path / "out", "kl", "random", "fisher"), *numbers)
    assert result.code == 0, result.err
    results = read(tmp_path / "out")
    assert len({(trial["layer"], *trial["neurons"]) for trial in results["trials"][:120]}) == 120
    found = results["correlations"]
    assert list(found) == ["minitron", "random", "fisher"]
    for where in ("all_layers", "within_layers"):
        assert found["minitron"]["single"][where]["value"] > 0.9999
        assert found["minitron"]["single"][where]["low"] > 0.999
        assert found["minitron"]["groups"][where]["value"] > 0.5
        noise = found["random"]["single"][where]
        assert noise["low"] < 0 < noise["high"]
        assert abs(noise["value"]) < 0.2
        assert 0.2 < noise["high"] - noise["low"] < 0.6, "about 4 / sqrt(120)"
        assert found["fisher"]["single"][where]["low"] > 0.3


@pytest.mark.usefixtures("no_plots")
def test_files_of_one_criterion_are_told_apart_by_their_names(world: Path, scored: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run(*command(world, scored, output, "random", "another", "flap")).code == 0
    results = read(output)
    assert list(results["correlations"]) == ["random", "another", "flap"]
    files = {name: hp.Scores.load(scored / name) for name in ("random", "another")}
    for trial in results["trials"][:20]:
        for name, scores in files.items():
            (neuron,) = trial["neurons"]
            assert trial["scores"][name] == pytest.approx(float(scores.values[trial["layer"]][neuron]))
    (tmp_path / "b").mkdir()
    files["another"].save(tmp_path / "b" / "random")
    again = command(world, scored, tmp_path / "x", "random")
    refused(run(*again, "--scores", tmp_path / "b" / "random"), "have the same names; rename one")
    refused(run(*again, "--scores", scored / "random"), "have the same names; rename one")
    assert not (tmp_path / "x").exists()


def arguments(world: Path, scored: Path, output: Path, **changes: Any) -> dict[str, Any]:
    config = hp.AblateConfig((scored / "fisher",), hp.Text(str(world / "held.txt"), 24, 2), 6, 3, 4)
    model = changes.pop("model", str(world / "dense"))
    return {"model": model, "output": output, "config": replace(config, **changes)}


def counted(patch: pytest.MonkeyPatch, stop: int | None = None) -> list[Any]:
    """The trials made from now on; once there were `stop` of them, the next is an interruption."""
    real = Bench.divergence
    calls: list[Any] = []

    def divergence(self: Bench, trial: Any) -> float:
        if len(calls) == stop:
            raise Interruption
        calls.append(trial)
        return real(self, trial)

    patch.setattr(Bench, "divergence", divergence)
    return calls


def interrupted(world: Path, scored: Path, output: Path, stop: int | None = None, **changes: Any) -> None:
    """Ablate until there were `stop` trials, or all."""

    def stopped(*_: object) -> None:
        raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stop)
        patch.setattr(ablate, "correlate", stopped)
        with pytest.raises(Interruption):
            hp.ablate(**arguments(world, scored, output, **changes))
    assert not output.exists()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_an_interrupted_run_goes_on(
    world: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = hp.ablate(**arguments(world, scored, tmp_path / "whole"))
    output = tmp_path / "out"
    interrupted(world, scored, output, stop)
    calls = counted(monkeypatch)
    record = hp.ablate(**arguments(world, scored, output))
    assert record.results == whole.results
    assert len(calls) == 9 - stop
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_what_is_finished_for_the_same_command(
    world: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    words, real = command(world, scored, tmp_path / "out"), Bench.divergence
    begun: list[Any] = []

    def divergence(self: Bench, trial: Any) -> float:
        begun.append(trial)
        if len(begun) == 5:
            os.kill(os.getpid(), number)
        return real(self, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "divergence", divergence)
        refused(run(*words), f"interrupted by {signal.Signals(number).name}", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.ablate-unfinished"]
    calls = counted(monkeypatch)
    assert run(*words).code == 0
    assert len(calls) == 28 - 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CHANGES: dict[str, Callable[[Path, Path], tuple[int, dict[str, Any]]]] = {
    "another text": lambda world, _: (9, {"text": hp.Text(str(world / "other.txt"), 24, 2)}),
    "more windows": lambda world, _: (9, {"text": hp.Text(str(world / "held.txt"), 24, 3)}),
    "dtype": lambda *_: (9, {"compute": hp.ComputeConfig(dtype="bfloat16")}),
    "more groups": lambda *_: (2, {"groups": 5}),
    "another criterion": lambda _, scored: (
        0,
        {
            "scores": (
                scored / "fisher",
                scored / "flap",
            )
        },
    ),
}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_changed_run_left_is_never_mixed_up(
    world: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    missing, changes = CHANGES[change](world, scored)
    output = tmp_path / "out"
    fresh = hp.ablate(**arguments(world, scored, tmp_path / "fresh", **changes))
    interrupted(world, scored, output)
    calls = counted(monkeypatch)
    assert hp.ablate(**arguments(world, scored, output, **changes)).results == fresh.results
    assert len(calls) == missing


@pytest.mark.usefixtures("no_plots")
def test_scores_and_trials_of_another_model_are_refused(
    world: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = save_checkpoint(tmp_path / "second", initializer_range=0.2)
    changed = command(world, scored, tmp_path / "out")
    changed[1] = second
    refused(run(*changed), "these scores belong to another model")
    assert [path.name for path in tmp_path.iterdir()] == ["second"]
    hp.score_checkpoint(str(second), tmp_path / "own", hp.ScoreConfig(criterion="random"))
    output, changes = tmp_path / "out", {"model": str(second), "scores": (tmp_path / "own",)}
    interrupted(world, scored, output, scores=(scored / "random",))
    calls = counted(monkeypatch)
    hp.ablate(**arguments(world, scored, output, **changes))
    assert len(calls) == 9


@pytest.mark.usefixtures("no_plots")
def test_every_option_arrives(world: Path, scored: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"a": "x", "b": "y" * n}) + "\n" for n in range(40, 60)))
    result = run(
        *("ablate", world / "dense", "--output", tmp_path / "out", "--scores", scored / "random"),
        *("--text", tmp_path / "text.jsonl", "--text-column", "b", "--seq-len", 16, "--max-windows", 2, "--seed", 5),
        *("--neurons", 4, "--groups", 3, "--group-size", 7, "--batch-size", 2, "--device", "cpu"),
        *("--dtype", "float64", "--attention", "eager", "--json"),
    )
    assert result.code == 0, result.err
    assert result.json["arguments"] == {
        "model": str(world / "dense"),
        "output": str(tmp_path / "out"),
        "scores": [str(scored / "random")],
        "text": {
            "source": str(tmp_path / "text.jsonl"), "seq_len": 16, "max_windows": 2, "fidelity": True,
            "text_column": "b",
        },
        "compute": {"device": "cpu", "dtype": "float64", "batch_size": 2, "recompute": None,
            "attention": "eager", "stream": None, "scratch": None, "deterministic": False},
        "neurons": 4,
        "groups": 3,
        "group_size": 7,
        "seed": 5,
        "overwrite": False,
    }  # fmt: skip
    trials = [(trial["layer"], tuple(trial["neurons"])) for trial in result.json["results"]["trials"]]
    assert trials == sample(hp.Scores.load(scored / "random"), 4, 3, 7, 5)


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--neurons", 121), "neurons 121 is more than the model's 3 layers of 40"),
    (("--neurons", 0), "neurons 0 must be at least 1"),
    (("--groups", -1), "groups -1 must be at least 0"),
    (("--group-size", 1), "group-size 1 must be at least 2"),
    (("--seed", 2**64), f"seed {2**64} must lie in 0 to 4294967295"),
    (("--group-size", 41), "group-size 41 is more than the 40 neurons of a layer"),
    (("--seq-len", 65), "seq-len 65 exceeds the model's 64 positions; use --seq-len 64"),
    (("--seq-len", 1), "seq-len 1 must be at least 2"),
    (("--text", "WORLD/missing.txt"), "text WORLD/missing.txt does not exist"),
    (("--text", "WORLD/short.txt"), "its 9 tokens make no window of 24"),
    (("--text", "self"), "'self' is text for calibration only"),
    (("--scores", "WORLD/missing"), "scores file WORLD/missing does not exist"),
    (("--scores", "WORLD/held.txt"), "held.txt is no readable scores file"),
    (("--scores", "SCORED/broken"), "the scores of model.layers.0.mlp contain NaN"),
    (("--output", "WORLD/dense"), "is the input"),
    (("--output", "SCORED"), "contains the input"),
    (("--output", "SCORED/kl"), "exists already; choose another name, or replace it with --overwrite"),
    (("--device", "gpu7"), "device 'gpu7' is not known"),
    (("--batch-size", 0), "batch-size 0 must be at least 1"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    world: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    (world / "short.txt").write_text("few words")
    monkeypatch.setattr(Checkpoint, "load", None)

    def placed(text: object) -> str:
        return str(text).replace("WORLD", str(world)).replace("SCORED", str(scored))

    refused(run(*command(world, scored, tmp_path / "out"), *map(placed, words)), placed(message))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_plots")
def test_an_output_that_exists_is_replaced_only_when_asked(world: Path, scored: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("old")
    refused(run(*command(world, scored, tmp_path / "out")), "exists already")
    refused(run(*command(world, scored, tmp_path / "out"), "--overwrite"), "holds note, which hifiprune did not write")
    assert (tmp_path / "out" / "note").read_text() == "old"
    (tmp_path / "out" / "note").unlink()
    assert run(*command(world, scored, tmp_path / "out"), "--overwrite").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".hifiprune.json", "ablate.json"}
