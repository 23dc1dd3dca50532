"""The documents keep to what exists: commands parse, targets exist, names resolve, figures come from the results."""

import ast
import json
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hifiprune
from benchmarks import (
    criteria,
    figures,
    llama,
    llama_families,
    quality,
    quantization,
    recovery,
    scale,
    speed,
    zero_shot,
)
from hifiprune.cli.app import app
from hifiprune.cli.tables import demo_rows
from hifiprune.commands.export import TYPES
from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.io.json_files import read_record
from hifiprune.models.families import FAMILIES
from hifiprune.results import DemoResults
from hifiprune.run_record import RunRecord
from tests import families
from tests.conftest import byte_tokenizer

ROOT = Path(__file__).parent.parent
README, DOCS, RESULTS = ROOT / "README.md", ROOT / "docs", ROOT / "benchmarks" / "results"
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted(DOCS.rglob("*.md")))]


def page(name: str) -> str:
    """Return the text of a documentation page."""
    return (DOCS / name).read_text()


def words_of(name: str) -> str:
    """Return the text of a documentation page in one line."""
    return " ".join(page(name).split())


def results(name: str) -> dict[str, Any]:
    """Return what a benchmark recorded."""
    facts: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return facts


def commands(page: str) -> list[list[str]]:
    """The `hifiprune` command lines in a page's code blocks, continued lines joined."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("hifiprune ")]


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page)], ids=" ".join)
def test_commands_exist_and_parse(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands[words[1]]
    context = command.make_context(words[1], words[2:])
    assert {"model", "models", "dense", "folder", "folders"} & {*context.params} or words[1] in ("demo", "criteria")


def test_the_guide_shows_all_commands() -> None:
    group: Any = typer.main.get_command(app)
    assert {words[1] for words in commands("docs/guide.md")} == set(group.commands)


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    model = families.tiny_model("llama", intermediate_size=512, vocab_size=257)
    model.save_pretrained("MODEL")
    byte_tokenizer().save_pretrained("MODEL")
    Path("c4.jsonl").write_text("".join(json.dumps({"text": f"{number} " * 200}) + "\n" for number in range(12)))
    for size, less in (("num_samples=128", "num_samples=8"), ("seq_len=1024", "seq_len=32")):
        assert size in code
        code = code.replace(size, less)
    names: dict[str, Any] = {}
    exec(code, names)
    small = AutoModelForCausalLM.from_pretrained("small")
    assert small.num_parameters() < model.num_parameters()
    assert small.config.intermediate_size == names["plan"].widths[0] < 512
    assert AutoTokenizer.from_pretrained("small")("text").input_ids


def test_the_notebook_holds_what_its_code_printed() -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], "run in order, all of them"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}, "no errors"
    printed = "".join(line for output in outputs for line in output.get("text", []))
    assert "perplexity" in printed
    assert "pruned: " in printed
    imports = [line for cell in cells for line in cell["source"] if line.startswith(("import ", "from "))]
    exec("".join(imports), {})


def test_the_readme_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_and_files_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([\w-]+)", text)) - {"the"} <= targets
    for path in re.findall(r"`((?:tests|benchmarks|docs|src|examples)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert ((ROOT / name).parent / path).exists(), path


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert {*re.findall(r"[\w/-]+\.md", navigation)} == pages


def test_the_families_are_those_of_the_table() -> None:
    assert families.table() in page("families.md")
    assert f"{len(FAMILIES)} model types" in " ".join(README.read_text().split())


def test_functions_named_in_the_method_exist() -> None:
    names = re.findall(r"`((?:\w+\.)+\w+_?)`", page("method.md") + page("internals.md"))
    assert len(names) >= 50
    for name in names:
        pkgutil.resolve_name(f"hifiprune.{name}")


def test_the_public_names_resolve() -> None:
    assert sorted([*hifiprune.__all__, "__version__"]) == dir(hifiprune)
    for name in hifiprune.__all__:
        assert getattr(hifiprune, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        getattr(hifiprune, "prun")  # noqa: B009 - type checkers know that it is not there


def test_type_checkers_are_told_the_same_public_names() -> None:
    stub = ast.parse(Path(hifiprune.__file__).with_suffix(".pyi").read_text())
    told = {
        (alias.asname, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    real = {(name, f"hifiprune.{module}") for name, module in vars(hifiprune)["_MODULES"].items()}
    assert told == real | {("__version__", "hifiprune.version")}


def test_the_readmes_table_and_figures_are_the_recorded_ones() -> None:
    readme = README.read_text()
    assert figures.table() in readme
    assert [words for words in figures.sentences() if words not in " ".join(readme.split())] == []


def test_the_readmes_figure_is_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = figures.FIGURE.read_text()
    monkeypatch.setattr(figures, "FIGURE", tmp_path / figures.FIGURE.name)
    figures.main()
    assert (tmp_path / figures.FIGURE.name).read_text() == committed
    assert "docs/figures/quality-size.svg" in README.read_text()


def test_the_demo_table_is_the_recorded_one() -> None:
    facts = results("demo")
    assert facts["results"]["criterion"] == DEFAULT_CRITERION
    record: RunRecord[DemoResults] = read_record(ROOT / "benchmarks" / "results" / "demo.json", RunRecord[DemoResults])
    rows = [f"| {' | '.join(row)} |" for row in demo_rows(record)]
    assert [row for row in rows if row not in page("guide.md")] == []


def test_the_table_of_criteria_is_the_recorded_one() -> None:
    assert criteria.table(results("criteria"), results("ablation")) in page("results/criteria.md")


def test_the_tables_of_quality_are_the_recorded_ones() -> None:
    assert quality.table(results("quality"), alone=False) in page("results/quality.md")
    assert quality.table(results("quality"), alone=True) in page("findings.md")
    assert zero_shot.table(results("zero_shot")) in page("results/quality.md")


def test_the_table_of_start_tokens_is_the_recorded_one() -> None:
    facts = results("bos")
    for name, found in facts["perplexity"].items():
        assert f"| {name} | {found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f}) |" in page("method.md")
    assert f"{facts['held_out_windows']} windows of {facts['positions']} tokens" in page("method.md")
    assert f"calibrated on {facts['calibration_windows']} windows" in words_of("method.md")


def test_the_table_of_recovery_is_the_recorded_one() -> None:
    assert recovery.table(results("recovery")) in page("results/recovery.md")


def test_the_table_of_quantization_is_the_recorded_one() -> None:
    facts = results("quantization")
    assert quantization.table(facts) in page("quantization.md")
    assert [words for words in quantization.sentences(facts) if words not in words_of("quantization.md")] == []


def test_the_speed_of_pruned_models_is_the_recorded_one() -> None:
    facts = results("speed")
    assert speed.table(facts) in page("results/speed.md")
    assert speed.reasons(facts) in page("results/speed.md")
    assert f"differ by up to {facts['noise']:.0%} between rounds" in words_of("results/speed.md")
    dense = facts["parts"][0]["models"]["dense"]
    for phase, words in (("reading", "of the prefill time"), ("writing", "of the time of decoding one token")):
        share = dense[phase]["attention"] / sum(dense[phase].values())
        assert f"{share:.0%} {words}" in words_of("results/speed.md")


def test_what_the_page_on_export_says_of_llama_cpp_was_measured() -> None:
    facts = results("llama_cpp")
    assert llama.table(facts) in page("export.md")
    for words in llama.words(facts):
        assert words in words_of("export.md"), words
    prompts = len(llama.PROMPTS)
    for kind in llama.EXACT:
        assert facts["types"][kind]["same_tokens"] == [facts["new_tokens"]] * prompts


def test_the_page_on_exports_table_of_families_is_the_recorded_one() -> None:
    facts = results("llama_families")
    assert set(facts) == set(families.MIXED), "all but experts and images, of which the page says that"
    assert llama_families.table(facts) in page("export.md")


def test_the_page_on_export_names_all_types() -> None:
    types = page("export.md").partition("## Types")[2].partition("## What")[0]
    assert {*re.findall(r"`(auto|b?f\d+|i?q\d\w+)`", types)} == {*TYPES}


def test_what_the_page_on_scale_says_was_measured() -> None:
    facts = results("scale")
    for table in (scale.table(facts), scale.foreseen(facts), scale.settling(facts)):
        assert table in page("scale.md")
    for words in (scale.spared(facts), scale.others(facts), f"with the power {scale.power(facts)[0]:.2f} of"):
        assert words in words_of("scale.md")


def test_what_the_page_on_scale_predicts_is_what_the_cost_model_says() -> None:
    assert scale.far() in page("scale.md")


def test_the_cost_of_repair_is_the_recorded_one() -> None:
    repair = results("repair")["results"]["sequential repair"]
    words = f"{repair['to_scoring']:.2f} of the scoring's time ({repair['seconds_per_window']:.1f} s a window"
    assert f"Repair takes {words}" in page("results/speed.md")


def test_the_cost_of_scoring_is_the_recorded_one() -> None:
    for variant, result in results("scoring")["results"].items():
        shown = [f"{result['seconds_per_window']:.1f} s", f"{result['peak_bytes_above_weights'] / 1e9:.2f} GB"]
        if variant != "papers":
            shown += [f"{result[name]:.2f}" for name in ("time_ratio", "memory_ratio", "share_of_product_speed")]
        assert [figure for figure in shown if figure not in page("results/speed.md")] == [], variant
