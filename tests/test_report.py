"""The report: what it tells of real runs of a tiny model, and that it is one file."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from playwright.sync_api import Browser, sync_playwright
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import hifiprune as hp
from hifiprune.deployment.compatibility import remark_on_mixed
from hifiprune.evaluation.token_comparison import in_place, read_passage
from hifiprune.plan import Plan
from hifiprune.reports.figures import add_legend, draw_bars, figure_of, inline_svg, label, new_axes
from hifiprune.reports.report_sections import sections_of
from hifiprune.reports.runs import read_runs
from hifiprune.reports.sections import Plot
from hifiprune.results import Estimate, Token
from hifiprune.scores import Scores
from tests.commands import refused, run
from tests.conftest import byte_tokenizer
from tests.families import tiny_model, tiny_tokens
from tests.naive import divergence, logits_of
from tests.processes import run_module


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of all commands that a report shows."""
    folder, dense = tmp_path_factory.mktemp("runs"), world / "dense"
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    found = {name: folder / name for name in ("plain", "mixed", "measured", "timed", "trained", "compared")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hifiprune.commands.bench.run_program", run_module(folder))
        results = [
            run("prune", dense, "--output", found["plain"], "--width", 24, "--preset", "hfprune", *text),
            run("prune", dense, "--output", found["mixed"], "--width", 24, "--allocation", "global", *text),
            run(
                *("evaluate", found["plain"], found["mixed"], "--against", dense, "--text", world / "held.txt"),
                *("--seq-len", 24, "--output", found["measured"]),
            ),
            run(
                *("bench", dense, found["plain"], "--lengths", 8, "--new-tokens", 3, "--rounds", 1, "--repeats", 1),
                *("--output", found["timed"]),
            ),
            run(
                *("recover", found["plain"], "--output", found["trained"], "--data", world / "calibration.txt"),
                *("--seq-len", 24, "--max-steps", 2, "--gradient-accumulation-steps", 1, "--evaluate-every", 1),
            ),
            run(
                *(
                    "compare",
                    dense,
                    "--output",
                    found["compared"],
                    "--criteria",
                    "hfprune,random",
                    "--ratios",
                    "0.1,0.2",
                ),
                *(*text, "--seeds", 2, "--text", world / "held.txt", "--round-to", 1),
            ),
        ]
    for result in results:
        assert result.code == 0, result.err
    return found


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def tokens(self) -> list[dict[str, Any]]:
        """What its script reads."""
        found: list[dict[str, Any]] = json.loads(max((t for t in self.texts if t.startswith("[")), key=len))
        return found


def plots_of(*folders: Path) -> dict[str, Plot]:
    """Plots of a report, by name."""
    return {plot.id: plot for section in sections_of(read_runs(folders)) for plot in section.plots}


def named_lines(plot: Plot) -> dict[str, Line2D]:
    """Lines of a plot by their names in its legend."""
    handles, labels = plot.axes.get_legend_handles_labels()
    lines = (one.lines[0] if isinstance(one, ErrorbarContainer) else one for one in handles)
    return dict(zip(labels, lines, strict=True))


def named_bars(plot: Plot) -> dict[str, BarContainer]:
    """Bars of a plot by the names of their series."""
    return {str(bars.get_label()): bars for bars in plot.axes.containers if isinstance(bars, BarContainer)}


def test_a_report_is_one_file_that_tells_of_all_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    result = run("report", *runs.values(), "--output", tmp_path / "report.html")
    assert result.code == 0, result.err
    page = Page((tmp_path / "report.html").read_text())
    titles = [
        text for text in page.texts if text in re.findall(r"<h2>(.*?)</h2>", (tmp_path / "report.html").read_text())
    ]
    assert titles == [
        "Checkpoints", "Quality against size", "Recovery training", "Criteria compared", "Layer by layer",
        "Neuron overlap", "Token by token", "Speed", "Cost", "Records",
    ]  # fmt: skip
    addresses = [value for tag, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert addresses == ["data:,"], "nothing is fetched"
    plots = [attrs for tag, attrs in page.tags if attrs.get("role") == "img"]
    assert [attrs["id"] for attrs in plots] == [*plots_of(*runs.values())]
    assert all(attrs["aria-label"] for attrs in plots)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(plots)
    named = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(named) == len({*named}), "what one figure refers to is its own"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size < 5e5, "small enough to send"
    refused(run("report", *runs.values(), "--output", tmp_path / "report.html"), "exists already")
    refused(run("report", tmp_path, "--output", tmp_path / "other.html"), "has no run.json of hifiprune")


def test_mixed_widths_come_with_who_runs_them(runs: dict[str, Path], tmp_path: Path) -> None:
    pages = {}
    for name in ("plain", "mixed"):
        pages[name] = " ".join(Page(hp.report([runs[name]], tmp_path / f"{name}.html").read_text()).texts)
    assert remark_on_mixed() in pages["mixed"]
    assert "trust_remote_code" in remark_on_mixed()
    assert remark_on_mixed() not in pages["plain"]


def test_a_uniform_cut_is_told_in_words(runs: dict[str, Path], tmp_path: Path) -> None:
    page = Page(hp.report([runs["plain"]], tmp_path / "plain.html").read_text())
    assert "widths" not in plots_of(runs["plain"]), "a line at one height shows nothing"
    plan = Plan.load(runs["plain"] / "hifiprune" / "plan.json")
    (width,), (neurons,) = {*plan.widths}, {*plan.neurons}
    assert f"plain keeps {width} of {neurons} neurons in each of {len(plan.widths)} layers." in page.texts


def test_bars_are_as_thick_for_one_model_as_for_many() -> None:
    estimate, heights = Estimate(1.0, None, None), []
    for number in (1, 4, 40):
        axes = new_axes("x", "")
        draw_bars(axes, [str(row) for row in range(number)], {name: [estimate] * number for name in "abc"})
        figure = figure_of(axes)
        figure.draw_without_rendering()
        bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
        assert len(bars) == 3 * number
        heights += [bar.get_window_extent().height / figure.dpi for bar in bars]
    assert 0.1 < min(heights) <= max(heights) < 0.25, "inches"


def test_a_figure_is_the_same_text_each_time_in_the_colours_of_the_page() -> None:
    drawn = []
    for _ in range(2):
        axes = new_axes("a <b> & $x$", "")
        axes.plot([1, 2], [3, 4], label=label("_$1_$ <i>"))
        axes.plot([1, 2], [4, 3], label=label("\N{CJK UNIFIED IDEOGRAPH-6A21}"))
        add_legend(axes)
        drawn.append(inline_svg(figure_of(axes), "name"))
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith("<svg")
    assert "#000000" not in drawn[0]
    assert "currentColor" in drawn[0]
    assert "#ffffff" not in drawn[0], "no paper of its own"
    words = ElementTree.fromstring(drawn[0]).itertext()
    assert {"\u200b_$1_$ <i>", "\N{CJK UNIFIED IDEOGRAPH-6A21}"} <= {word.strip("\n ") for word in words}


def test_plots_show_what_was_found(runs: dict[str, Path]) -> None:
    plots = plots_of(*runs.values())
    plans = [Plan.load(runs[name] / "hifiprune" / "plan.json") for name in ("plain", "mixed")]
    widths = named_lines(plots["widths"])
    assert {name: np.asarray(line.get_ydata()).tolist() for name, line in widths.items()} == {
        name: plan.widths for name, plan in zip(("plain", "mixed"), plans, strict=True)
    }
    assert plots["widths"].table[1:] == [
        [str(layer), *map(str, kept)] for layer, kept in enumerate(zip(*(plan.widths for plan in plans), strict=True))
    ]
    scores = [Scores.load(runs[name] / "hifiprune" / "scores.safetensors").values for name in ("plain", "mixed")]
    drawn = iter(plots["scores"].axes.lines)
    for layers in scores:
        for place in (50, 10, 90):
            whole = np.median(np.concatenate(layers))
            shares = [np.percentile(layer, place) / whole for layer in layers]
            assert next(drawn).get_ydata() == pytest.approx(shares)
    kept_sets = [{(i, n) for i, each in enumerate(plan.kept) for n in each.tolist()} for plan in plans]
    ((_, share), (_, whole)) = plots["overlap"].axes.images[0].get_array()  # type: ignore[misc]
    assert share == pytest.approx(len(kept_sets[0] & kept_sets[1]) / len(kept_sets[0] | kept_sets[1]))
    assert whole == 1
    rows = json.loads((runs["measured"] / "run.json").read_text())["results"]["models"].values()
    dense = next(iter(rows))["metrics"]["dense_perplexity"]["value"]
    for plot, metric, beside in (("kl-1", "kl", 0.0), ("perplexity-0", "perplexity", dense)):
        points = named_lines(plots[plot])
        values = [row["metrics"][metric]["value"] for row in rows]
        assert [*points] == ["dense", "plain", "mixed"]
        assert [point.get_ydata()[0] for point in points.values()] == [beside, *values]  # type: ignore[index]
        assert [point.get_xdata()[0] for point in points.values()][1:] == [row["parameters"] / 1e6 for row in rows]  # type: ignore[index]
        assert [row[2] for row in plots[plot].table[1:]] == [f"{value:.4g}" for value in (beside, *values)]
    (looks,) = named_lines(plots["training"]).values()
    losses = json.loads((runs["trained"] / "run.json").read_text())["results"]["held_out_losses"]
    assert np.asarray(looks.get_xdata()).tolist() == [step for step, _ in losses] == [0, 1, 2]
    assert looks.get_ydata() == pytest.approx([math.exp(loss) for _, loss in losses])
    summary = json.loads((runs["compared"] / "compare.json").read_text())["results"]["summary"]
    lines = named_lines(plots["kl-compared-0"])
    assert {name.removesuffix(" (far above)") for name in lines} == {"hfprune", "random"}
    for name, line in lines.items():
        cells = [row for row in summary if (row["criterion"], row["metric"]) == (name.split()[0], "kl")]
        assert [row["ratio"] for row in cells] == [0.1, 0.2]
        written = [[row["criterion"], f"{row['ratio']:.0%}", f"{row['mean']:.4g}"] for row in cells]
        assert [row[:3] for row in plots["kl-compared-0"].table if row[0] == name.split()[0]] == written
        if not name.endswith("(far above)"):
            assert np.asarray(line.get_ydata()).tolist() == [row["mean"] for row in cells]
    parts = named_bars(plots["cost"])
    stages = {
        name: json.loads((runs[name] / "run.json").read_text())["stages"] for name in ("plain", "mixed", "trained")
    }
    assert [*parts][: len(stages["plain"])] == [stage["name"] for stage in stages["plain"]], "as they ran"
    for number, steps in enumerate(stages.values()):
        taken = {stage: bars[number].get_width() for stage, bars in parts.items() if bars[number].get_width()}
        assert taken == pytest.approx({step["name"]: step["seconds"] for step in steps if step["seconds"]})


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(runs["trained"], tmp_path / name / "trained")
    folders = [tmp_path / name / "trained" for name in ("one", "two", "one")]
    assert [*named_lines(plots_of(*folders)["training"])] == ["one/trained", "two/trained"]


def test_text_that_looks_like_a_page_stays_text(runs: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "measured"
    odd.mkdir()
    (odd / "run.json").write_bytes((runs["measured"] / "run.json").read_bytes())
    token = {"text": "<!--<script></script><b>", "kl": 1.0, "dense": [["<i>", 1.0]], "pruned": [["&", 1.0]]}
    (odd / "passages.json").write_text(json.dumps({"small": [[{"text": "x"}, token]]}))
    page = Page(hp.report([odd], tmp_path / "r.html").read_text())
    assert "<!--" not in (tmp_path / "r.html").read_text()
    assert page.tokens() == [token]
    assert token["text"] in page.texts, "and it is read without a script"
    assert not any(tag in ("b", "i") for tag, _ in page.tags)


def test_passages_say_what_both_models_expect() -> None:
    dense, pruned = tiny_model("llama"), tiny_model("qwen3")
    tokens, tokenizer = tiny_tokens(1, 9)[0], byte_tokenizer()
    first, *rest = read_passage(dense, pruned, tokenizer, tokens)
    assert first == Token(str(tokenizer.decode(tokens[:1])))
    logits = [logits_of(model, tokens[None])[0, :-1].detach() for model in (dense, pruned)]
    for place, token in enumerate(rest):
        assert token.kl == pytest.approx(float(divergence(logits[0][place], logits[1][place])), rel=1e-4)
        for name, own in zip(("dense", "pruned"), logits, strict=True):
            top = own[place].softmax(-1).topk(10)
            texts, shares = zip(*getattr(token, name), strict=True)
            assert [*shares] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert [*texts] == [tokenizer.decode([index]) for index in top.indices.tolist()]
        assert token.text == tokenizer.decode([int(tokens[place + 1])])


def test_tokens_keep_their_spaces_and_characters() -> None:
    letters = {"\u2581a": 0, "\u2581quick": 1, "ly": 2, "<0xC3>": 3, "<0xA9>": 4}
    fast = Tokenizer(BPE(letters, [], byte_fallback=True))
    parts = [Replace("\u2581", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)]  # as that of Llama 2
    fast.decoder = Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    ids = [0, 1, 2, 3, 4, 1]
    assert [in_place(tokenizer, ids[:place], token) for place, token in enumerate(ids)] == [
        "a", " quick", "ly", "\N{REPLACEMENT CHARACTER}", "\N{LATIN SMALL LETTER E WITH ACUTE}", " quick",
    ]  # fmt: skip


def test_evaluations_on_one_text_share_a_plot(runs: dict[str, Path], tmp_path: Path) -> None:
    record = json.loads((runs["measured"] / "run.json").read_text())
    rows = record["results"]["models"]
    for number, row in enumerate(rows.values()):
        record["results"]["models"] = {f"{number}/same": row}
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record))
    plots = plots_of(tmp_path / "0", tmp_path / "1")
    assert [name for name in plots if name.startswith(("kl", "perplexity"))] == ["perplexity-0", "kl-1"]
    assert [*named_lines(plots["kl-1"])][1:] == ["0/same", "1/same"], "after the dense one"


def test_accuracies_have_bars(tmp_path: Path) -> None:
    facts = {"value": 0.5, "low": 0.4, "high": 0.6, "standard_error": 0.05}
    row = {"parameters": 10, "tasks": {"piqa/acc_norm": facts}, "average": facts}
    results = {"models": {"x/a": row, "y/a": row}, "items": {"piqa": [20, 1838]}}
    record = {"command": "evaluate", "arguments": {"text": None}, "results": results, "stages": []}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text(json.dumps(record))
    page = Page(hp.report([tmp_path / "e"], tmp_path / "r.html").read_text())
    plot = plots_of(tmp_path / "e")["tasks-e"]
    assert [*named_bars(plot)] == ["x/a", "y/a"]
    assert "20 of 1,838" in page.texts
    assert any("at most 20 items were asked" in text for text in page.texts)
    assert [text.get_text() for text in plot.axes.get_yticklabels()] == ["piqa/acc_norm", "average"]
    for bars in named_bars(plot).values():
        assert bars.errorbar
        (spans,) = bars.errorbar.lines[2]
        assert isinstance(spans, LineCollection)
        assert np.array(spans.get_segments())[:, :, 0] == pytest.approx(np.array([[0.4, 0.6]] * 2))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window; `make test-browser` installs it where it can."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        assert "HIFIPRUNE_BROWSER" not in os.environ, "Chromium is to be there"
        pytest.skip("needs Chromium: make test-browser installs it on Debian")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_in_a_browser(
    browser: Browser, runs: dict[str, Path], tmp_path: Path, width: int, theme: Any
) -> None:
    address = hp.report([*runs.values()], tmp_path / "r.html").as_uri()
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=theme)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: None if request.url in (address, "data:,") else troubles.append(request.url))
    page.goto(address)
    plots = page.locator(".plot")
    for number in range(plots.count()):
        box = plots.nth(number).locator("svg").bounding_box()
        assert box
        assert 0.8 * min(width - 32, 480) <= box["width"] <= min(width - 32, 560), plots.nth(number).get_attribute("id")
        sizes = (
            plots.nth(number)
            .locator("text")
            .evaluate_all(
                "(all) => all.filter((text) => text.textContent.trim()).map((text) => text.getBoundingClientRect())"
            )
        )
        assert min(min(text["height"], text["width"]) for text in sizes if len(sizes) > 1) > 5
        inside = [text["left"] >= box["x"] - 4 and text["right"] <= box["x"] + box["width"] + 4 for text in sizes]
        assert all(inside), plots.nth(number).get_attribute("id")
    assert plots.count() >= 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    first_table = "document.querySelector('.wide')"
    assert page.evaluate(f"{first_table}.scrollWidth <= {first_table}.clientWidth"), "no column is cut off"
    token = page.locator(".passage span[tabindex]").first
    assert page.locator("#tip").is_hidden()
    token.hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    box = tip.bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert len(tip.locator("tr").all()) == 11
    expected = json.loads((runs["measured"] / "passages.json").read_text())
    first = next(iter(expected.values()))[0][1]
    assert f"{first['kl']:.3f} nats" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot text')).fill")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert abs(brightness(ink) - brightness(paper)) > 120, "it can be read"
    folder = Path("build") / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"report-{width}-{theme}.png", full_page=True)
    page.close()
    assert troubles == []


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`."""
    numbers = [int(number) for number in re.findall(r"\d+", colour)[:3]]
    return sum(numbers) / 3
