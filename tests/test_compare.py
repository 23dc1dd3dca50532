"""`compare` and `criteria`: every figure against the plain way to it, and runs interrupted, changed or refused."""

import json
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.collections
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hifiprune as hp
from hifiprune.calibration import sample_windows
from hifiprune.commands import compare_plans, prepare
from hifiprune.config import CriterionOptions, Tasks
from hifiprune.engine.temporary_cut import cut
from hifiprune.evaluation import fidelity, lm_eval_harness
from hifiprune.evaluation.bootstrap import bootstrap_paired
from hifiprune.evaluation.criteria_comparison import jaccard
from hifiprune.evaluation.fidelity import METRICS, measure_windows
from hifiprune.evaluation.zero_shot_tasks import TaskRunner, zero_shot
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.json_files import to_plain
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.reports import plots
from hifiprune.scoring.criteria import CRITERIA as KNOWN_CRITERIA
from hifiprune.study_results import CompareResults, HeldText
from tests.commands import Interruption, Result, leftovers, refused, run
from tests.conftest import save_checkpoint
from tests.processes import command as command_line
from tests.processes import start

CRITERIA = ("hfprune", "self-distillation", "fisher", "magnitude")
RATIOS = (0.1, 0.26)
PAPERS = {0.1: (0.4, 0.2), 0.26: (0.42, 0.5)}
"""Alpha and temperature of arXiv 2506.11120 at the ratios nearest to these, 0.2 and 0.3."""
SEEDS = (0, 1)
SIZES = ("--num-samples", 3, "--seq-len", 24, "--round-to", 2)
MEASURED = ("--max-windows", 5, "--batch-size", 4)
Record = dict[str, Any]


@dataclass
class Finished:
    """A comparison that ran to its end."""

    result: Result
    folder: Path
    record: Record

    @property
    def results(self) -> Record:
        results: Record = self.record["results"]
        return results

    def table(self, criterion: str, ratio: float, metric: str, text: int = 0) -> np.ndarray[Any, Any]:
        """Values of a metric `[seeds, windows]`."""
        rows = [c for c in self.results["cells"] if (c["criterion"], c["ratio"]) == (criterion, ratio)]
        assert [row["seed"] for row in rows] == list(SEEDS)
        return np.array([row["windows"][text][metric] for row in rows])

    def kept(self, criterion: str, ratio: float, seed: int, width: int) -> list[set[int]]:
        """The neurons that the saved scores say should stay."""
        values = self.scores(criterion, ratio, seed).values
        return [set(np.argsort(-layer.numpy(), kind="stable")[:width].tolist()) for layer in values]

    def scores(self, criterion: str, ratio: float, seed: int) -> hp.Scores:
        name = f"{criterion}-{ratio:g}" if criterion == "self-distillation" else criterion
        return hp.Scores.load(self.folder / "scores" / f"{name}-seed{seed}.safetensors")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that plots take."""
    monkeypatch.setattr(plots, "draw_comparison", lambda *_: None)


def command(world: Path, output: Path) -> list[object]:
    return [
        *("compare", world / "dense", "--output", output, "--calibration", world / "calibration.txt"),
        *("--text", world / "held.txt", "--perplexity-text", world / "other.txt", "--seeds", len(SEEDS)),
        *("--criteria", ",".join(CRITERIA), "--ratios", ",".join(map(str, RATIOS)), *SIZES, *MEASURED),
    ]


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished") / "com pared"
    result = run(*command(world, folder))
    assert result.code == 0, result.err
    return Finished(result, folder, json.loads((folder / "compare.json").read_text()))


def test_the_folder_holds_the_record_plots_and_scores(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    drawn = {"perplexity-1", "perplexity-2", "kl", "mass", "overlap"}
    made = {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert names == {".hifiprune.json", "compare.json", "scores", *made}
    for name in drawn:
        with Image.open(finished.folder / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 10
        root = ElementTree.parse(finished.folder / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter())) > 50
    labels = {"hfprune", "self-distillation-0.1", "self-distillation-0.26", "fisher", "magnitude"}
    made = {f"{label}-seed{seed}.safetensors" for label in labels for seed in SEEDS}
    assert {path.name for path in (finished.folder / "scores").iterdir()} == made
    assert [path.name for path in finished.folder.parent.iterdir()] == ["com pared"]


def test_the_table_names_every_criterion_and_says_what_to_do_next(finished: Finished, tmp_path: Path) -> None:
    lines = finished.result.out.splitlines()
    for criterion in CRITERIA:
        assert sum(f" {criterion} " in line for line in lines if line[:1] in "│|") == 4, "two texts, two ratios"
    dense = [line for line in lines if " dense " in line]
    values = [finished.results["dense"][text]["perplexity"]["value"] for text in (0, 0, 1, 1)]
    assert all(f" {value:.4g} " in line for line, value in zip(dense, values, strict=True))
    assert all(len(line) <= 80 for line in lines if line[:1] in "│|")
    assert lines[-1].startswith("Next: hifiprune ")
    words = shlex.split(lines[-1].removeprefix("Next: hifiprune "))
    means = {name: finished.table(name, 0.1, "kl").mean() for name in CRITERIA}
    best = hp.Scores.load(words[words.index("--scores") + 1])
    assert best.criterion == min(CRITERIA, key=lambda name: means[name])
    result = run(*words[:-1], tmp_path / "small", "--json")
    assert result.code == 0, result.err
    assert result.json["results"]["width"]["after"] == finished.results["widths"]["0.1"][0]


@pytest.mark.usefixtures("no_plots")
def test_json_is_one_object_on_one_line(world: Path, tmp_path: Path) -> None:
    short = ("--criteria", "magnitude", "--ratios", 0.1, "--seeds", 1, "--json")
    result = run(*command(world, tmp_path / "out"), *short)
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    assert result.json == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result.json["results"]["summary"][0]["spread"] is None
    assert result.json["results"]["overlap"]["0.1"]["seeds"] == {"magnitude": None}, "one draw overlaps with no other"


def test_widths_are_the_budgets(world: Path, finished: Finished) -> None:
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "dense").parameters())
    for ratio in RATIOS:
        width, reached = finished.results["widths"][str(ratio)]
        exact = 40 - ratio * total / (3 * 3 * 24)
        assert width % 2 == 0
        assert abs(width - exact) <= 1
        assert reached == pytest.approx((40 - width) * 3 * 3 * 24 / total)


def test_every_cell_is_what_prune_and_evaluate_give(world: Path, finished: Finished, tmp_path: Path) -> None:
    dense, held, other = (str(world / name) for name in ("dense", "held.txt", "other.txt"))
    compared = 0
    for cell in finished.results["cells"]:
        criterion, ratio, seed = cell["criterion"], cell["ratio"], cell["seed"]
        if criterion == "magnitude" and seed:
            continue
        folder = tmp_path / f"{criterion}-{ratio}-{seed}"
        calibration = hp.Calibration(str(world / "calibration.txt"), 3, 24, seed)
        hp.prune(
            dense, folder, hp.PruneConfig(hp.Budget(ratio), calibration, criterion=criterion, round_to=2, repair="none")
        )
        saved = hp.Scores.load(folder / "hifiprune" / "scores.safetensors")
        used = finished.scores(criterion, ratio, seed)
        assert saved.settings["options"] == used.settings["options"]
        for one, two in zip(saved.values, used.values, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-9)
        alike: dict[str, Any] = {"compute": hp.ComputeConfig(batch_size=2)}
        found = measured(str(folder), held, against=dense, **alike)
        assert set(found) == set(METRICS) == set(cell["windows"][0])
        assert set(cell["windows"][1]) == {"perplexity", "entropy"}
        pairs = [(found, cell["windows"][0])]
        if ratio == RATIOS[0]:
            alone = measured(str(folder), other, **alike)
            pairs.append((alone, cell["windows"][1]))
        for metrics, windows in pairs:
            for name, estimate in metrics.items():
                mean = np.mean(windows[name])
                value = np.exp(mean) if name.endswith("perplexity") else mean
                assert value == pytest.approx(estimate["value"], rel=1e-4, abs=1e-6), (criterion, ratio, seed, name)
                compared += 1
    assert compared == 14 * 9 + 7 * 2


def test_self_distillation_uses_the_papers_values_at_each_ratio(finished: Finished) -> None:
    for ratio in RATIOS:
        alpha, temperature = PAPERS[ratio]
        expected = {"alpha": alpha, "temperature": temperature, "light_cut": 0.025}
        assert finished.scores("self-distillation", ratio, 1).settings["options"] == expected


@pytest.mark.parametrize(("round_to", "reached"), [(1, 0.239), (7, 0.254)])
def test_the_ratio_asked_for_decides_the_papers_values_not_the_one_reached(
    world: Path, tmp_path: Path, round_to: int, reached: float
) -> None:
    calibration = hp.Calibration(str(world / "calibration.txt"), 2, 16)
    config = hp.PruneConfig(hp.Budget(0.24), calibration, criterion="self-distillation", round_to=round_to)
    record = hp.prune(str(world / "dense"), tmp_path / "out", config)
    assert record.results.ratio.reached == pytest.approx(reached, abs=0.001)
    assert record.to_dict()["results"]["scoring"]["options"]["alpha"] == 0.4


def bootstrap(differences: np.ndarray[Any, Any], resamples: int = 20_000) -> list[float]:
    """The middle 95% of means, seeds and windows drawn again independently of each other: how often each is drawn."""
    chance = np.random.default_rng(1)
    often = [chance.multinomial(size, [1 / size] * size, resamples) for size in differences.shape]
    means = np.einsum("rs,sw,rw->r", often[0], differences, often[1]) / differences.size
    return list(np.quantile(means, [0.025, 0.975]))


def test_the_summary_follows_from_the_values_by_window(finished: Finished) -> None:
    rows = finished.results["summary"]
    seen = {(row["text"], row["metric"], row["ratio"], row["criterion"]) for row in rows}
    plain = [name for name in METRICS if name != "dense_perplexity"]
    asked = [(0, name) for name in plain] + [(1, "perplexity"), (1, "entropy")]
    assert seen == {(*each, ratio, name) for each in asked for ratio in RATIOS for name in CRITERIA}
    assert len(rows) == len(seen)
    for row in rows:
        values, first = (
            finished.table(name, row["ratio"], row["metric"], row["text"]) for name in (row["criterion"], "hfprune")
        )
        means = np.exp(values.mean(1)) if row["metric"] == "perplexity" else values.mean(1)
        assert row["mean"] == pytest.approx(means.mean(), rel=1e-9, abs=1e-12)
        assert row["spread"] == pytest.approx(means.std(ddof=1), rel=1e-6, abs=1e-9)
        difference = row["difference"]
        assert difference["value"] == pytest.approx((values - first).mean(), rel=1e-9, abs=1e-12)
        if row["criterion"] == "hfprune":
            assert difference == {"value": 0, "low": 0, "high": 0}
        elif row["metric"] in ("kl", "perplexity"):
            assert difference["low"] < difference["value"] < difference["high"]
            low, high = bootstrap(values - first)
            assert difference["low"] == pytest.approx(low, abs=0.1 * (high - low))
            assert difference["high"] == pytest.approx(high, abs=0.1 * (high - low))


@pytest.mark.parametrize(("by_seed", "by_window"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.2, 1.0)])
def test_the_paired_interval_knows_seeds_and_windows(by_seed: float, by_window: float) -> None:
    """What varies by seed is the same for all windows, and the other way round; both count."""
    chance = np.random.default_rng(3)
    values = (
        0.1 * chance.normal(size=(5, 30)) + by_seed * chance.normal(size=(5, 1)) + by_window * chance.normal(size=30)
    )
    found = bootstrap_paired(torch.tensor(values))
    low, high = bootstrap(values)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.08 * (high - low))
    assert found.high == pytest.approx(high, abs=0.08 * (high - low))
    assert bootstrap_paired(torch.tensor(values[:, :1])).low is None


def test_the_dense_model_is_measured_too(world: Path, finished: Finished) -> None:
    for number, name in enumerate(("held.txt", "other.txt")):
        found = measured(str(world / "dense"), str(world / name))
        for metric, estimate in found.items():
            assert finished.results["dense"][number][metric] == pytest.approx(estimate, rel=1e-5), metric
    assert finished.results["dense"][0]["kl"]["value"] == 0
    assert set(finished.results["dense"][1]) == {"perplexity", "entropy"}


def test_overlap_and_mass_follow_from_the_saved_scores(finished: Finished) -> None:
    def similarity(first: list[set[int]], second: list[set[int]]) -> float:
        shared = sum(len(a & b) for a, b in zip(first, second, strict=True))
        return shared / sum(len(a | b) for a, b in zip(first, second, strict=True))

    for ratio in RATIOS:
        width = finished.results["widths"][str(ratio)][0]
        kept = {(name, seed): finished.kept(name, ratio, seed, width) for name in CRITERIA for seed in SEEDS}
        found = finished.results["overlap"][str(ratio)]
        for first in CRITERIA:
            for second in CRITERIA:
                expected = np.mean([similarity(kept[first, seed], kept[second, seed]) for seed in SEEDS])
                assert found["criteria"][first][second] == pytest.approx(expected)
            expected = np.mean([similarity(kept[first, a], kept[first, b]) for a, b in combinations(SEEDS, 2)])
            assert found["seeds"][first] == pytest.approx(expected)
        assert found["seeds"]["magnitude"] == 1
        assert found["seeds"]["hfprune"] < 1
    for name in CRITERIA:
        shares = []
        for ratio in RATIOS:
            for seed in SEEDS:
                sums = np.array([np.maximum(v.numpy(), 0).sum() for v in finished.scores(name, ratio, seed).values])
                shares.append(sums / sums.sum())
        assert finished.results["mass"][name] == pytest.approx(np.mean(shares, 0), rel=1e-5)


def test_similarity_of_plans_of_different_widths() -> None:
    def plan(*kept: list[int]) -> hp.Plan:
        return hp.Plan([torch.tensor(each) for each in kept], [9] * 2, ["a", "b"], None, 0.0, 0, 0)

    assert jaccard(plan([0, 1, 2], [5]), plan([2, 3], [4, 5])) == pytest.approx(2 / 6)


def typed(results: Record) -> CompareResults:
    return TypeAdapter(CompareResults).validate_python(results)


def test_plots_show_the_results(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.update({path.name: figure}))
    plots.draw_comparison(typed(finished.results), tmp_path)
    assert set(figures) == {"perplexity-1", "perplexity-2", "kl", "mass", "overlap"}
    for name, metric, text in (("perplexity-1", "perplexity", 0), ("perplexity-2", "perplexity", 1), ("kl", "kl", 0)):
        drawn, labels = figures[name].axes[0].get_legend_handles_labels()
        bars = dict(zip(labels, drawn, strict=True))
        assert set(bars) - {"dense"} == set(CRITERIA)
        for criterion in CRITERIA:
            line, _, (segments, *_) = bars[criterion].lines
            means = [row for row in finished.results["summary"] if (row["text"], row["metric"]) == (text, metric)]
            own = [row for row in means if row["criterion"] == criterion]
            assert list(line.get_xdata()) == list(RATIOS)
            assert list(line.get_ydata()) == pytest.approx([row["mean"] for row in own])
            assert isinstance(segments, matplotlib.collections.LineCollection)
            tall = [high - low for (_, low), (_, high) in (segment.tolist() for segment in segments.get_segments())]
            assert tall == pytest.approx([2 * row["spread"] for row in own], rel=1e-3, abs=1e-9)
        assert ("dense" in bars) == (metric == "perplexity")
        if metric == "perplexity":
            assert bars["dense"].get_ydata()[0] == finished.results["dense"][text][metric]["value"]
    shown = figures["mass"].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [finished.results["mass"][name] for name in CRITERIA])
    heats = [axes for axes in figures["overlap"].axes if axes.images]
    for axes, ratio in zip(heats, RATIOS, strict=True):
        found = finished.results["overlap"][str(ratio)]
        table = np.array([list(row.values()) for row in found["criteria"].values()])
        np.fill_diagonal(table, list(found["seeds"].values()))
        np.testing.assert_allclose(axes.images[0].get_array(), table)


def test_what_is_far_above_the_best_is_only_named(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.update({path.name: figure}))
    results = json.loads(json.dumps(finished.results))
    for row in results["summary"]:
        if row["criterion"] == "magnitude" or (row["criterion"], row["ratio"]) == ("fisher", 0.26):
            row["mean"] *= 100
    plots.draw_comparison(typed(results), tmp_path)
    drawn, labels = figures["kl"].axes[0].get_legend_handles_labels()
    points = {label: list(bars.lines[0].get_xdata()) for label, bars in zip(labels, drawn, strict=True)}
    assert points == {
        "hfprune": [0.1, 0.26],
        "self-distillation": [0.1, 0.26],
        "fisher (far above)": [0.1],
        "magnitude (far above)": [],
    }


def arguments(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A smaller comparison, for `hp.compare`."""
    config = hp.CompareConfig(
        hp.Calibration(str(world / "calibration.txt"), 2, 24),
        (hp.Text(str(world / "held.txt"), 24, 4),),
        ("self-distillation", "fisher", "magnitude"),
        (0.26,),
        seeds=2,
        round_to=2,
        compute=hp.ComputeConfig(batch_size=4),
    )
    model = changes.pop("model", str(world / "dense"))
    return {"model": model, "output": output, "config": replace(config, **changes)}


def words(world: Path, output: Path) -> list[str]:
    """The same on the command line."""
    given = [
        *("compare", world / "dense", "--output", output, "--calibration", world / "calibration.txt"),
        *("--text", world / "held.txt", "--max-windows", 4, "--seq-len", 24, "--num-samples", 2, "--seeds", 2),
        *("--criteria", "self-distillation,fisher,magnitude", "--ratios", 0.26, "--round-to", 2, "--batch-size", 4),
    ]
    return [str(word) for word in given]


MEASUREMENTS = 6  # the dense model, two draws of two criteria, and magnitude once
Calls = list[tuple[Any, ...]]


def measured(model: str, text: str, **how: Any) -> dict[str, dict[str, float]]:
    """What `evaluate` finds for a model on 5 windows of a text."""
    config = hp.EvaluateConfig(hp.Text(text, 24, 5), **how)
    metrics: dict[str, dict[str, float]] = hp.evaluate(model, config).to_dict()["results"]["models"][model]["metrics"]
    return metrics


def counted(patch: pytest.MonkeyPatch, name: str, stop: int | None = None, owner: Any = compare_plans) -> Calls:
    """The calls of a function from now on; after `stop` of them, one is an interruption."""
    real = getattr(owner, name)
    calls: Calls = []

    def call(*positional: Any, **named: Any) -> Any:
        calls.append(positional)
        if stop is not None and len(calls) == stop + 1:
            raise Interruption
        return real(*positional, **named)

    patch.setattr(owner, name, call)
    return calls


def interrupted(world: Path, output: Path, name: str, stop: int, owner: Any = compare_plans, **changes: Any) -> None:
    """Compare until a function was called `stop` times."""
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, name, stop, owner)
        with pytest.raises(Interruption):
            hp.compare(**arguments(world, output, **changes))
    assert not output.exists()


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareResults:
    """The results of the smaller comparison without any interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_comparison", lambda *_: None)
        calls = counted(patch, "measure_windows")
        record = hp.compare(**arguments(world, tmp_path_factory.mktemp("whole") / "out"))
        assert len(calls) == MEASUREMENTS
    return record.results


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_measuring_goes_on_where_it_stopped(
    world: Path, whole: CompareResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    output = tmp_path / "out"
    interrupted(world, output, "measure_windows", stop)
    measured, scored = counted(monkeypatch, "measure_windows"), counted(monkeypatch, "score_all")
    record = hp.compare(**arguments(world, output))
    assert record.results == whole
    assert (len(measured), len(scored)) == (MEASUREMENTS - stop, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("name", "stop", "owner", "missing"),
    [
        (
            "score_all",
            0,
            compare_plans,
            [["self-distillation", "fisher", "magnitude"], ["self-distillation", "fisher"]],
        ),
        ("score_all", 1, compare_plans, [["self-distillation", "fisher"]]),
        ("save", 1, hp.Scores, [["fisher", "magnitude"], ["self-distillation", "fisher"]]),
        ("save", 4, hp.Scores, [["fisher"]]),
    ],
)
def test_scoring_goes_on_where_it_stopped(
    world: Path, whole: CompareResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stop: int,
    owner: Any, missing: list[list[str]],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    interrupted(world, output, name, stop, owner)
    scored = counted(monkeypatch, "score_all")
    assert hp.compare(**arguments(world, output)).results == whole
    assert [[criterion for criterion, _ in requests] for _, _, requests in scored] == missing


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_what_is_finished_for_the_same_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_plans, "measure_windows", lambda *_, **__: os.kill(os.getpid(), number))
        result = run(*words(world, output))
    refused(result, f"interrupted by {signal.Signals(number).name}", code=1)
    assert "starts again" not in result.err
    assert not output.exists()
    scored = counted(monkeypatch, "score_all")
    assert run(*words(world, output)).code == 0
    assert scored == []


def slow_down() -> None:
    """Have this process measure so slowly that it is met at work."""

    def slow(*positional: Any, **named: Any) -> Any:
        time.sleep(0.3)
        return measure_windows(*positional, **named)

    pytest.MonkeyPatch().setattr(compare_plans, "measure_windows", slow)


@pytest.mark.usefixtures("no_plots")
def test_a_killed_process_goes_on(
    world: Path,
    whole: CompareResults,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    cells = tmp_path / "out.compare-unfinished" / "cells"
    (process,) = start(tmp_path_factory.mktemp("told"), command_line(*words(world, output), before=slow_down))
    while len(list(cells.glob("*.json"))) < 2:
        assert process.is_alive(), "it ended too early"
        time.sleep(0.02)
    process.kill()
    process.join()
    known = len(list(cells.glob("*.json")))
    assert not output.exists()
    (cells.parent / "scores" / ".left.partial").mkdir()
    measured, scored = counted(monkeypatch, "measure_windows"), counted(monkeypatch, "score_all")
    result = run(*words(world, output))
    assert result.code == 0, result.err
    assert scored == []
    assert len(measured) == MEASUREMENTS - known
    assert f"Measuring: {len(measured)} of {MEASUREMENTS} measurements are to be made" in result.err
    assert close(json.loads((output / "compare.json").read_text())["results"], to_plain(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert leftovers(output / "scores") == []


def close(first: Any, second: Any) -> bool:
    """Whether plain data are equal but for the last digits."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(close, first, second))
    if isinstance(first, float):
        return math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-6)
    return bool(first == second)


@pytest.fixture(scope="module")
def abandoned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a comparison leaves that is interrupted when all is scored and measured."""
    folder = tmp_path_factory.mktemp("abandoned")
    interrupted(world, folder / "out", "draw_comparison", 0, plots)
    return folder / "out.compare-unfinished"


@pytest.fixture(scope="module")
def single(world: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareResults:
    """The results of the smaller comparison by one draw, without anything to start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_comparison", lambda *_: None)
        return hp.compare(**arguments(world, tmp_path_factory.mktemp("single") / "out", seeds=1)).results


def small(folder: Path, **options: object) -> str:
    return str(save_checkpoint(folder / "second", **options))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Change:
    """A comparison by one draw that differs from the one before it.

    Attributes:
        to: what differs, of `world` and the test's own folder.
        scored: criteria whose scores depend on it.
        measured: measurements that depend on it, of the dense model and three cut ones.
    """

    to: Callable[[Path, Path], dict[str, Any]]
    scored: tuple[str, ...] = ()
    measured: int = 4


SMALLER = ("self-distillation", "fisher", "magnitude")
CHANGES = {
    "another model": Change(lambda _, folder: {"model": small(folder, initializer_range=0.2)}, SMALLER),
    "more windows": Change(
        lambda world, _: {"calibration": hp.Calibration(str(world / "calibration.txt"), 3, 24)}, SMALLER[:2], 2
    ),
    "attention": Change(lambda *_: {"compute": hp.ComputeConfig(attention="eager", batch_size=4)}, SMALLER),
    "another text": Change(lambda world, _: {"texts": (hp.Text(str(world / "other.txt"), 24, 4),)}),
    "fewer windows of the text": Change(lambda world, _: {"texts": (hp.Text(str(world / "held.txt"), 24, 3),)}),
    "perplexity only": Change(lambda world, _: {"texts": (hp.Text(str(world / "held.txt"), 24, 4, fidelity=False),)}),
    "dtype": Change(lambda *_: {"compute": hp.ComputeConfig(dtype="bfloat16", batch_size=4)}, SMALLER),
    "label samples": Change(lambda *_: {"options": CriterionOptions(label_samples=2)}, ("fisher",), 1),
    "alpha": Change(lambda *_: {"options": CriterionOptions(alpha=0.9)}, ("self-distillation",), 1),
    "light cut": Change(lambda *_: {"options": CriterionOptions(light_cut=0.3)}, ("self-distillation",), 1),
    "ratio": Change(lambda *_: {"ratios": [0.2]}, ("self-distillation",), 3),
    "rounding": Change(lambda *_: {"round_to": 8}, (), 3),
    "fewer criteria": Change(lambda *_: {"criteria": ("fisher",)}, (), 0),
}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("change", CHANGES)
def test_a_part_is_used_again_where_nothing_that_it_depends_on_changed(
    world: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    shutil.copytree(abandoned, tmp_path / "out.compare-unfinished")
    measured, scored = counted(monkeypatch, "measure_windows"), counted(monkeypatch, "score_all")
    hp.compare(**arguments(world, tmp_path / "out", seeds=1, **CHANGES[change].to(world, tmp_path)))
    assert tuple(criterion for _, _, requests in scored for criterion, _ in requests) == CHANGES[change].scored
    assert len(measured) == CHANGES[change].measured


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("change", ["more windows", "ratio"])
def test_what_a_changed_run_left_is_never_mixed_up(
    world: Path, single: CompareResults, abandoned: Path, tmp_path: Path, change: str
) -> None:
    changes = {"seeds": 1, **CHANGES[change].to(world, tmp_path)}
    fresh = hp.compare(**arguments(world, tmp_path / "fresh", **changes))
    shutil.copytree(abandoned, tmp_path / "out.compare-unfinished")
    record = hp.compare(**arguments(world, tmp_path / "out", **changes))
    assert record.results == fresh.results
    assert record.results != single, "or the test could not fail"
    scores = [sorted(path.name for path in (tmp_path / name / "scores").iterdir()) for name in ("out", "fresh")]
    assert scores[0] == scores[1]
    for name in scores[0]:
        one, two = (hp.Scores.load(tmp_path / folder / "scores" / name) for folder in ("out", "fresh"))
        assert all(torch.equal(a, b) for a, b in zip(one.values, two.values, strict=True))


@pytest.mark.usefixtures("no_plots")
def test_damaged_parts_are_made_again(
    world: Path, whole: CompareResults, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(abandoned, tmp_path / "out.compare-unfinished")
    cell, *_ = (tmp_path / "out.compare-unfinished" / "cells").iterdir()
    scores, *_ = (tmp_path / "out.compare-unfinished" / "scores").iterdir()
    for path in (cell, scores):
        path.write_bytes(path.read_bytes()[:-9])
    measured, scored = counted(monkeypatch, "measure_windows"), counted(monkeypatch, "score_all")
    result = run(*words(world, tmp_path / "out"))
    assert result.code == 0, result.err
    assert result.err.count("is damaged and is made again") == 2
    assert (len(measured), len(scored)) == (1, 1)
    assert close(
        json.loads((tmp_path / "out" / "compare.json").read_text())["results"], json.loads(json.dumps(to_plain(whole)))
    )


def test_a_folder_of_the_users_is_not_touched(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "load", None)
    (tmp_path / "out.compare-unfinished").mkdir()
    (tmp_path / "out.compare-unfinished" / "novel.txt").write_text("Once upon a time")
    refused(
        run(*words(world, tmp_path / "out")),
        "out.compare-unfinished is needed for unfinished work but is not hifiprune's",
    )
    assert [path.name for path in (tmp_path / "out.compare-unfinished").iterdir()] == ["novel.txt"]


def test_what_an_ablation_left_beside_the_same_output_stays(world: Path, abandoned: Path, tmp_path: Path) -> None:
    shutil.copytree(abandoned, tmp_path / "out.ablate-unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_comparison", lambda *_: None)
        hp.compare(**arguments(world, tmp_path / "out", criteria=("magnitude",), seeds=1))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.ablate-unfinished"}


@pytest.mark.usefixtures("no_plots")
def test_text_from_the_model_itself_is_sampled_for_each_draw_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"criteria": ("hfprune",), "calibration": hp.Calibration("self", 2, 12)}
    interrupted(world, tmp_path / "out", "measure_windows", 1, **own)
    sampled = counted(monkeypatch, "sample_windows")
    hp.compare(**arguments(world, tmp_path / "out", **own))
    assert sampled == []
    model = AutoModelForCausalLM.from_pretrained(world / "dense")
    for seed in (0, 1):
        scores = hp.Scores.load(tmp_path / "out" / "scores" / f"hfprune-seed{seed}.safetensors")
        windows = sample_windows(model, hp.Calibration("self", 2, 12, seed))
        assert scores.data_hash == hash_tokens(windows)
        assert scores.settings["calibration"]["seed"] == seed


@pytest.mark.usefixtures("no_plots")
def test_one_more_criterion_and_ratio_use_what_is_there(
    world: Path, abandoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"criteria": ("hfprune", "self-distillation", "fisher"), "ratios": (0.26, 0.1), "seeds": 1}
    fresh = hp.compare(**arguments(world, tmp_path / "fresh", **more))
    shutil.copytree(abandoned, tmp_path / "out.compare-unfinished")
    measured, scored = counted(monkeypatch, "measure_windows"), counted(monkeypatch, "score_all")
    record = hp.compare(**arguments(world, tmp_path / "out", **more))
    assert record.results == fresh.results
    new = [{name: options.alpha for name, options in requests} for _, _, requests in scored]
    assert [list(names) for names in new] == [["hfprune", "self-distillation"]]
    assert {names["self-distillation"] for names in new} == {0.4}, "the papers' at 0.2, which is nearest to 0.1"
    assert len(measured) == 1 + 3, "hfprune at 0.26, all at 0.1"


@pytest.mark.usefixtures("no_plots")
def test_every_text_is_measured_against_the_dense_model_on_itself(world: Path, tmp_path: Path) -> None:
    names = ("held", "other")
    texts = [hp.Text(str(world / f"{name}.txt"), 24, 4) for name in names]
    both = hp.compare(**arguments(world, tmp_path / "both", criteria=("hfprune",), seeds=1, texts=tuple(texts))).results
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        alone = hp.compare(**arguments(world, tmp_path / name, criteria=("hfprune",), seeds=1, texts=(text,))).results
        assert both.cells[0].windows[number] == alone.cells[0].windows[0]
        assert both.dense[number] == alone.dense[0]
        assert both.texts[number] == alone.texts[0] == HeldText(text.source, [4, 24])


@pytest.mark.usefixtures("no_plots")
def test_equal_plans_are_measured_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = counted(monkeypatch, "measure_windows")
    names = ["hfprune", "entropy", "magnitude"]
    record = hp.compare(**arguments(world, tmp_path / "out", criteria=tuple(names), seeds=3))
    assert len(measured) == 1 + 3 + 1
    assert len(record.results.cells) == 9
    cells = {(cell.criterion, cell.seed): cell.windows for cell in record.results.cells}
    assert all(cells["hfprune", seed] == cells["entropy", seed] for seed in range(3))
    assert cells["hfprune", 0] != cells["hfprune", 1]
    assert cells["magnitude", 0] == cells["magnitude", 2]


@pytest.mark.usefixtures("no_plots")
def test_the_model_is_whole_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[PreTrainedModel] = []

    def load(*given: Any) -> tuple[PreTrainedModel, str]:
        model, model_hash = prepare.load_hashed(*given)
        loaded.append(model)
        return model, model_hash

    monkeypatch.setattr("hifiprune.commands.compare.load_hashed", load)
    hp.compare(**arguments(world, tmp_path / "out"))
    interrupted(world, tmp_path / "again", "_per_position", 3, fidelity)
    plain = AutoModelForCausalLM.from_pretrained(world / "dense")
    assert len(loaded) == 2
    for model in loaded:
        assert model.config.intermediate_size == 40
        assert [mlp.neurons for mlp in find_mlps(model)] == [40] * 3
        weights = model.state_dict()
        assert all(torch.equal(weights.pop(name), weight) for name, weight in plain.state_dict().items())
        assert not weights


@pytest.mark.usefixtures("no_plots")
def test_every_option_arrives(world: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"a": "x", "b": "y" * n}) + "\n" for n in range(40, 60)))
    result = run(
        *("compare", world / "dense", "--output", tmp_path / "out", "--calibration", tmp_path / "text.jsonl"),
        *("--text", world / "held.txt", "--text", world / "other.txt", "--perplexity-text", world / "calibration.txt"),
        *("--criteria", "ppm, magnitude", "--ratios", "0.2,0.1", "--seeds", 2, "--max-windows", 3, "--seed", 7),
        *("--num-samples", 4, "--seq-len", 16, "--sampler", "stream", "--text-column", "b", "--alpha", 0.3),
        *("--temperature", 0.7, "--light-cut", 0.1, "--label-samples", 2, "--round-to", 3, "--batch-size", 2),
        *("--device", "cpu", "--dtype", "float64", "--recompute", "--attention", "eager", "--json"),
    )
    assert result.code == 0, result.err
    text = {"seq_len": 16, "max_windows": 3, "text_column": "b"}
    assert result.json["arguments"] == {
        "model": str(world / "dense"),
        "output": str(tmp_path / "out"),
        "criteria": ["ppm", "magnitude"],
        "ratios": [0.2, 0.1],
        "calibration": {
            "source": str(tmp_path / "text.jsonl"), "num_samples": 4, "seq_len": 16, "seed": 7, "sampler": "stream",
            "text_column": "b", "mixed": [], "bos": True, "prompts": None,
        },
        "seeds": 2,
        "texts": [
            {"source": str(world / "held.txt"), "fidelity": True, **text},
            {"source": str(world / "other.txt"), "fidelity": True, **text},
            {"source": str(world / "calibration.txt"), "fidelity": False, **text},
        ],
        "tasks": None,
        "options": {"alpha": 0.3, "temperature": 0.7, "light_cut": 0.1, "label_samples": 2, "seed": 7},
        "round_to": 3,
        "compute": {"device": "cpu", "dtype": "float64", "batch_size": 2, "recompute": True,
            "attention": "eager", "stream": None, "scratch": None, "deterministic": False},
        "overwrite": False,
    }  # fmt: skip
    results = result.json["results"]
    assert [(cell["ratio"], cell["seed"]) for cell in results["cells"]] == [
        (r, s) for s in (7, 8) for r in (0.2, 0.1) for _ in "ab"
    ]
    assert [text["windows"] for text in results["texts"]] == [[3, 16]] * 3
    assert {width % 3 for width, _ in results["widths"].values()} == {0}
    settings = hp.Scores.load(tmp_path / "out" / "scores" / "ppm-seed8.safetensors").settings
    assert (settings["compute_dtype"], settings["attention"]) == ("float64", "eager")


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--criteria", "hfprun"), "criterion 'hfprun' is not known"),
    (("--criteria", "hfprun"), "did you mean 'hfprune'?"),
    (("--criteria", "fisher,hfprune,fisher"), "criteria fisher, hfprune, fisher: each may be given once"),
    (("--criteria", " , "), "criteria: give at least one"),
    (("--ratios", "1.4"), "ratio 1.4 must lie in (0, 1); did you mean 0.4?"),
    (("--ratios", "0"), "ratio 0 must lie in (0, 1)"),
    (("--ratios", "0.2,-0.2"), "ratio -0.2 must lie in (0, 1)"),
    (("--ratios", "nan"), "ratio nan must lie in (0, 1)"),
    (("--ratios", "0.1,abc"), "ratios 'abc' is no number; separate several by commas"),
    (("--ratios", "0.1,0.9"), "ratio 0.9 is more than the MLPs hold"),
    (("--ratios", "0.001"), "nothing would be removed"),
    (("--ratios", "0.1,0.10"), "ratios 0.1, 0.1: each may be given once"),
    (("--ratios", ""), "ratios: give at least one"),
    (("--seeds", 0), "seeds 0 must be at least 1"),
    (("--seq-len", 65), "seq-len 65 exceeds the model's 64 positions; use --seq-len 64"),
    (("--num-samples", 999), "too little text in"),
    (("--alpha", 2), "alpha 2 must lie in [0, 1]"),
    (("--label-samples", 0), "label-samples 0 must be at least 1"),
    (("--round-to", 0), "round-to 0 must be at least 1"),
    (("--dtype", "float23"), "dtype 'float23' is not known"),
    (("--calibration", "WORLD/missing.txt"), "WORLD/missing.txt does not exist"),
    (("--calibration", "WORLD/held.txt"), "WORLD/held.txt is in both calibration and held-out text"),
    (("--calibration", "WORLD/../WORLDNAME/held.txt"), "is in both calibration and held-out text"),
    (("--calibration", "WORLD"), "WORLD/held.txt is in both calibration and held-out text"),
    (("--calibration", "some/data", "--text", "some/data:train"), "some/data:train is in both"),
    (("--seed", -1), "seed -1 must lie in 0 to 4294967295"),
    (("--seed", 2**32 - 1, "--seeds", 2), "seed 4294967296 must lie in 0 to 4294967295"),
    (("--ratios", "0.1,0.1000000001"), "ratios 0.1, 0.1: each may be given once"),
    (("--calibration", "WORLD/short.txt"), "too little text in WORLD/short.txt: its 9 tokens make no window of 24"),
    (("--text", "WORLD/short.txt"), "too little text in WORLD/short.txt: its 9 tokens make no window of 24"),
    (("--text", "WORLD/missing.txt"), "text WORLD/missing.txt does not exist"),
    (("--perplexity-text", "WORLD/missing.txt"), "text WORLD/missing.txt does not exist"),
    (("--text", "self"), "'self' is text for calibration only"),
    (("--text", "WORLD/held.txt"), "each may be given once"),
    (("--perplexity-text", "WORLD/held.txt"), "each may be given once"),
    (("--perplexity-text", "WORLD/calibration.txt"), "calibration.txt is in both calibration and held-out text"),
    (("--task-path", "WORLD"), "--task-path and --limit need --tasks"),
    (("--limit", 3), "--task-path and --limit need --tasks"),
    (("--tasks", ""), "tasks: give at least one"),
    (("--tasks", "piqa", "--task-path", "WORLD/missing"), "the folder of task files WORLD/missing does not exist"),
    (("--tasks", ","), "tasks: give at least one"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    (world / "short.txt").write_text("few words")
    monkeypatch.setattr(Checkpoint, "load", None)

    def placed(text: str) -> str:
        return text.replace("WORLDNAME", world.name).replace("WORLD", str(world))

    start = (
        *("compare", world / "dense", "--output", tmp_path / "out", "--calibration", world / "calibration.txt"),
        *("--text", world / "held.txt", "--criteria", "hfprune", "--ratios", 0.1, "--seeds", 1, *SIZES),
    )
    refused(run(*start, *(placed(str(word)) for word in words)), placed(message))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_is_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "riddles.yaml").write_text("task: riddles\noutput_type: multiple_choice\n")
    monkeypatch.setattr(lm_eval_harness, "_own_tasks", dict)
    monkeypatch.setattr(Checkpoint, "load", None)
    result = run(*command(world, tmp_path / "out"), "--tasks", "riddels", "--task-path", tmp_path / "tasks")
    refused(result, "unknown task 'riddels'; did you mean 'riddles'?")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_plots")
def test_an_output_that_exists_is_replaced_only_when_asked(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "note").write_text("old")
    short = (*command(world, output), "--criteria", "magnitude", "--ratios", 0.1, "--seeds", 1)
    refused(run(*short), "exists already; choose another name, or replace it with --overwrite")
    refused(run(*short, "--overwrite"), "holds note, which hifiprune did not write")
    assert (output / "note").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (output / "note").unlink()
    result = run(*short, "--overwrite")
    assert result.code == 0, result.err
    assert {path.name for path in output.iterdir()} == {".hifiprune.json", "compare.json", "scores"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    refused(run(*short[:3], world / "dense", *short[4:], "--overwrite"), "is the input")


@pytest.fixture
def tasks_folder(shared: Path, tmp_path: Path) -> Path:
    """The shared task files; copied, because Python leaves compiled files beside theirs."""
    tasks = tmp_path / "evals" / "tasks"
    shutil.copytree(shared / "evals" / "tasks", tasks, copy_function=shutil.copyfile)
    (tasks.parent / "data").symlink_to(shared.resolve() / "evals" / "data")
    return tasks


@pytest.mark.usefixtures("no_plots")
def test_tasks_are_run_on_the_cut_models(
    world: Path, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_harness, "_own_tasks", dict)
    folder, names = tmp_path / "out", ["hp_winogrande", "hp_piqa"]
    dense = save_checkpoint(tmp_path / "long", max_position_embeddings=1024)
    ran = counted(monkeypatch, "ask", owner=TaskRunner)
    result = run(
        *("compare", dense, "--output", folder, "--calibration", world / "calibration.txt", *SIZES),
        *("--text", world / "held.txt", "--criteria", "hfprune,magnitude", "--ratios", 0.26, "--seeds", 2),
        *("--tasks", ",".join(names), "--task-path", tasks_folder, "--limit", 4),
    )
    assert result.code == 0, result.err
    assert len(ran) == 4, "dense, two draws of hfprune, and magnitude once"
    results = json.loads((folder / "compare.json").read_text())["results"]

    def values(model: PreTrainedModel) -> dict[str, float]:
        tokenizer = AutoTokenizer.from_pretrained(dense)
        found = zero_shot(model, tokenizer, Tasks(tuple(names), tasks_folder, 4))
        return {name: estimate.value for name, estimate in found.items()}

    model = AutoModelForCausalLM.from_pretrained(dense)
    assert results["dense_tasks"] == values(model)
    assert set(results["dense_tasks"]) == {"hp_winogrande/acc", "hp_piqa/acc_norm"}
    found: dict[str, list[dict[str, float]]] = {}
    for cell in results["cells"]:
        scores = hp.Scores.load(folder / "scores" / f"{cell['criterion']}-seed{cell['seed']}.safetensors")
        with cut(model, hp.allocate(scores, hp.Budget(0.26), round_to=2)):
            expected = values(model)
        assert {name: value for name, (value,) in cell["windows"][1].items()} == expected
        found.setdefault(cell["criterion"], []).append(expected)
    for row in results["summary"]:
        if row["text"] == 1:
            by_seed = [each[row["metric"]] for each in found[row["criterion"]]]
            assert row["mean"] == pytest.approx(np.mean(by_seed))
            assert row["spread"] == pytest.approx(np.std(by_seed, ddof=1))
    assert "hp_piqa/acc_norm" in "".join(result.out.split())


@pytest.mark.parametrize("columns", ["30", "200"])
def test_criteria_are_listed_a_line_each(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = run("criteria")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == list(KNOWN_CRITERIA)
    for line, criterion in zip(lines, KNOWN_CRITERIA.values(), strict=True):
        assert criterion.summary in line
        assert criterion.reference in line
        needs = "backward" if criterion.objective else "forward" if criterion.statistic else "weights"
        assert needs in line.replace(criterion.summary, "")


def test_criteria_as_json() -> None:
    result = run("criteria", "--json")
    assert result.out.count("\n") == 1
    assert [row["name"] for row in result.json] == list(KNOWN_CRITERIA)
    assert all(set(row) == {"name", "needs", "summary", "reference"} for row in result.json)
    needs = {row["name"]: row["needs"] for row in result.json}
    assert needs["self-distillation"] == "2 x (forward, backward)"
    assert (needs["wanda-sp"], needs["magnitude"]) == ("forward", "weights")
