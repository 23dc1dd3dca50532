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

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import hifiprune as hp
from hifiprune.deployment.compatibility import remark_on_mixed
from hifiprune.evaluation.token_comparison import in_place, read_passage
from hifiprune.plan import Plan
from hifiprune.scores import Scores
from tests.commands import refused, run
from tests.conftest import byte_tokenizer
from tests.families import tiny_model, tiny_tokens
from tests.naive import divergence, logits_of


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of all commands that a report shows."""
    folder, dense = tmp_path_factory.mktemp("runs"), world / "dense"
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    found = {name: folder / name for name in ("plain", "mixed", "measured", "timed", "trained", "compared")}
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
            *("compare", dense, "--output", found["compared"], "--criteria", "hfprune,random", "--ratios", "0.1,0.2"),
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

    def data(self) -> dict[str, Any]:
        """What its script reads."""
        found: dict[str, Any] = json.loads(max((t for t in self.texts if t.startswith('{"plots"')), key=len))
        return found


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
    assert {attrs["id"] for attrs in plots} == set(page.data()["plots"])
    assert all(attrs["aria-label"] for attrs in plots)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size < 2.5e6, "small enough to send"
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
    assert "widths" not in page.data()["plots"], "bars of one height show nothing"
    plan = Plan.load(runs["plain"] / "hifiprune" / "plan.json")
    (width,), (neurons,) = {*plan.widths}, {*plan.neurons}
    assert f"plain keeps {width} of {neurons} neurons in each of {len(plan.widths)} layers." in page.texts


def test_few_bars_are_narrow_and_many_fill_the_plot() -> None:
    from plotly import graph_objects as go

    from hifiprune.reports.report_sections import _plot

    gaps = []
    for number in (1, 4, 40):
        bars = [go.Bar(x=[*range(number)], y=[1.0] * number, name=name) for name in "ab"]
        gaps.append(_plot("x", "x", go.Figure(bars), [], barmode="group").figure.layout.bargap)
    assert gaps == [pytest.approx(gap) for gap in (0.88, 0.52, 0.2)]


def test_plots_show_what_was_found(runs: dict[str, Path], tmp_path: Path) -> None:
    data = Page(hp.report([*runs.values()], tmp_path / "r.html").read_text()).data()
    plans = [Plan.load(runs[name] / "hifiprune" / "plan.json") for name in ("plain", "mixed")]
    assert [trace["y"] for trace in data["plots"]["widths"]["data"]] == [plan.widths for plan in plans]
    scores = [Scores.load(runs[name] / "hifiprune" / "scores.safetensors").values for name in ("plain", "mixed")]
    drawn = iter(data["plots"]["scores"]["data"])
    for layers in scores:
        for place in (50, 10, 90):
            whole = np.median(np.concatenate(layers))
            assert next(drawn)["y"] == pytest.approx([np.percentile(each, place) / whole for each in layers])
    kept = [{(i, n) for i, each in enumerate(plan.kept) for n in each.tolist()} for plan in plans]
    ((_, share), (_, whole)) = data["plots"]["overlap"]["data"][0]["z"]
    assert share == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    assert whole == 1
    measured = json.loads((runs["measured"] / "run.json").read_text())["results"]["models"]
    dense, *points = data["plots"]["kl-1"]["data"]
    assert dense["y"] == [0]
    assert [each["y"] for each in points] == [[row["metrics"]["kl"]["value"]] for row in measured.values()]
    assert [each["x"] for each in points] == [[row["parameters"] / 1e6] for row in measured.values()]
    dense, *points = data["plots"]["perplexity-0"]["data"]
    assert [each["name"] for each in (dense, *points)] == ["dense", "plain", "mixed"]
    assert dense["y"] == [next(iter(measured.values()))["metrics"]["dense_perplexity"]["value"]]
    assert [each["y"] for each in points] == [[row["metrics"]["perplexity"]["value"]] for row in measured.values()]
    (looks,) = data["plots"]["training"]["data"]
    losses = json.loads((runs["trained"] / "run.json").read_text())["results"]["held_out_losses"]
    assert looks["x"] == [step for step, _ in losses] == [0, 1, 2]
    assert looks["y"] == pytest.approx([math.exp(loss) for _, loss in losses])
    summary = json.loads((runs["compared"] / "compare.json").read_text())["results"]["summary"]
    lines = data["plots"]["kl-compared-0"]["data"]
    assert [line["name"] for line in lines] == ["hfprune", "random"]
    for line in lines:
        rows = [row for row in summary if (row["criterion"], row["metric"]) == (line["name"], "kl")]
        assert line["x"] == [row["ratio"] for row in rows] == [0.1, 0.2]
        assert line["y"] == [row["mean"] for row in rows]
        assert line["error_y"]["array"] == [row["spread"] for row in rows]
    seconds = sum(sum(trace["x"]) for trace in data["plots"]["cost"]["data"])
    stages = [
        stage
        for name in ("plain", "mixed", "trained")
        for stage in json.loads((runs[name] / "run.json").read_text())["stages"]
    ]
    assert seconds == pytest.approx(sum(stage["seconds"] for stage in stages))


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(runs["trained"], tmp_path / name / "trained")
    folders = [tmp_path / name / "trained" for name in ("one", "two", "one")]
    data = Page(hp.report(folders, tmp_path / "r.html").read_text()).data()
    assert [trace["name"] for trace in data["plots"]["training"]["data"]] == ["one/trained", "two/trained"]


def test_text_that_looks_like_a_page_stays_text(runs: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "measured"
    odd.mkdir()
    (odd / "run.json").write_bytes((runs["measured"] / "run.json").read_bytes())
    token = {"text": "<!--<script></script><b>", "kl": 1.0, "dense": [["<i>", 1.0]], "pruned": [["&", 1.0]]}
    (odd / "passages.json").write_text(json.dumps({"small": [[{"text": "x"}, token]]}))
    page = Page(hp.report([odd], tmp_path / "r.html").read_text())
    assert "<!--" not in (tmp_path / "r.html").read_text().split('id="data">')[1].split("</script>")[0]
    assert page.data()["passages"]["measured-0"][0][1]["text"] == "<!--<script></script><b>"
    assert not any(tag in ("b", "i") for tag, _ in page.tags)


def test_passages_say_what_both_models_expect() -> None:
    dense, pruned = tiny_model("llama"), tiny_model("qwen3")
    tokens, tokenizer = tiny_tokens(1, 9)[0], byte_tokenizer()
    first, *rest = read_passage(dense, pruned, tokenizer, tokens)
    assert first == {"text": tokenizer.decode(tokens[:1])}
    logits = [logits_of(model, tokens[None])[0, :-1].detach() for model in (dense, pruned)]
    for place, token in enumerate(rest):
        assert token["kl"] == pytest.approx(float(divergence(logits[0][place], logits[1][place])), rel=1e-4)
        for name, own in zip(("dense", "pruned"), logits, strict=True):
            top = own[place].softmax(-1).topk(10)
            assert [share for _, share in token[name]] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert [text for text, _ in token[name]] == [tokenizer.decode([index]) for index in top.indices.tolist()]
        assert token["text"] == tokenizer.decode([int(tokens[place + 1])])


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
    data = Page(hp.report([tmp_path / "0", tmp_path / "1"], tmp_path / "r.html").read_text()).data()
    quality = {name: plot for name, plot in data["plots"].items() if name.startswith(("kl", "perplexity"))}
    assert list(quality) == ["perplexity-0", "kl-1"]
    assert [each["name"] for each in quality["kl-1"]["data"][1:]] == ["0/same", "1/same"], "after the dense one"


def test_accuracies_have_bars(tmp_path: Path) -> None:
    facts = {"value": 0.5, "low": 0.4, "high": 0.6, "standard_error": 0.05}
    row = {"parameters": 10, "tasks": {"piqa/acc_norm": facts}, "average": facts}
    results = {"models": {"x/a": row, "y/a": row}, "items": {"piqa": [20, 1838]}}
    record = {"command": "evaluate", "arguments": {"text": None}, "results": results, "stages": []}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text(json.dumps(record))
    page = Page(hp.report([tmp_path / "e"], tmp_path / "r.html").read_text())
    bars = page.data()["plots"]["tasks-e"]["data"]
    assert [bar["name"] for bar in bars] == ["x/a", "y/a"]
    assert "20 of 1,838" in page.texts
    assert any("at most 20 items were asked" in text for text in page.texts)
    assert bars[0]["x"] == ["piqa/acc_norm", "average"]
    assert bars[0]["error_y"]["array"] == pytest.approx([0.1, 0.1])


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
    page.wait_for_function("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")
    plots = page.locator(".plot")
    for number in range(plots.count()):
        marks = ".scatterlayer .point, .scatterlayer .js-line, .barlayer .point path, .heatmaplayer image"
        assert plots.nth(number).locator(marks).count() > 0, plots.nth(number).get_attribute("id")
    assert plots.count() >= 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    first_table = "document.querySelector('.wide')"
    assert page.evaluate(f"{first_table}.scrollWidth <= {first_table}.clientWidth"), "no column is cut off"
    stages = json.loads((runs["plain"] / "run.json").read_text())["stages"]
    legend = page.locator("#cost .legendtext").all_text_contents()
    assert legend[: len({*(stage["name"] for stage in stages)})] == [*dict.fromkeys(stage["name"] for stage in stages)]
    bars = page.locator("#speed-timed .barlayer .point path")
    assert 0 < max(bar.bounding_box()["width"] for bar in bars.all()) <= 80  # type: ignore[index]
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
