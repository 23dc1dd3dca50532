"""The documents keep to what exists: commands parse, targets exist, names resolve, figures come from the results."""

import json
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import hifiprune
from benchmarks import llama, llama_families, quality, quantization, recovery, scale, speed, zero_shot
from benchmarks.criteria import readme_table
from hifiprune.cli.app import app
from hifiprune.cli.tables import demo_rows
from hifiprune.commands.export import TYPES
from hifiprune.defaults import DEFAULT_CRITERION
from tests import families

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "docs/method.md", "docs/findings.md", "docs/scale.md", "docs/families.md"]
PAGES += ["docs/quantization.md", "docs/deployment.md", "docs/export.md"]


def commands(page: str) -> list[list[str]]:
    """The `hifiprune` command lines in a page's code blocks, continued lines joined."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("hifiprune ")]


@pytest.mark.parametrize("words", commands("README.md") + commands("docs/quantization.md"), ids=" ".join)
def test_commands_exist_and_parse(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands[words[1]]
    context = command.make_context(words[1], words[2:])
    assert {"model", "models", "dense", "folder", "folders"} & {*context.params} or words[1] in ("demo", "criteria")


def test_the_readme_shows_all_commands() -> None:
    group: Any = typer.main.get_command(app)
    assert {words[1] for words in commands("README.md")} == set(group.commands)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([\w-]+)", text)) - {"the"} <= targets
    for path in re.findall(r"`((?:tests|benchmarks|docs|src)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert ((ROOT / page).parent / path).exists(), path


def test_the_families_are_those_of_the_table() -> None:
    assert families.table() in (ROOT / "docs" / "families.md").read_text()
    assert families.names() in " ".join((ROOT / "README.md").read_text().split())


def test_functions_named_in_the_method_exist() -> None:
    names = re.findall(r"`((?:\w+\.)+\w+_?)`", (ROOT / "docs" / "method.md").read_text())
    assert len(names) >= 50
    for name in names:
        pkgutil.resolve_name(f"hifiprune.{name}")


def test_the_public_names_resolve() -> None:
    assert set(hifiprune._HOMES) == set(hifiprune.__all__)
    for name in hifiprune.__all__:
        assert getattr(hifiprune, name).__doc__ or name == "CRITERIA"
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        hifiprune.prun  # noqa: B018


def test_the_readmes_demo_table_is_the_recorded_one() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert results["results"]["criterion"] == DEFAULT_CRITERION
    rows = [f"| {' | '.join(row)} |" for row in demo_rows(results)]
    readme = (ROOT / "README.md").read_text()
    assert [row for row in rows if row not in readme] == []


def test_the_readmes_table_of_criteria_is_the_recorded_one() -> None:
    results = ROOT / "benchmarks" / "results"
    compared, ablated = (json.loads((results / f"{name}.json").read_text()) for name in ("criteria", "ablation"))
    assert readme_table(compared, ablated) in (ROOT / "README.md").read_text()


def test_the_readmes_table_beyond_the_papers_is_the_recorded_one() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    assert quality.table(facts, alone=False) in (ROOT / "README.md").read_text()
    assert quality.table(facts, alone=True) in (ROOT / "docs" / "findings.md").read_text()


def test_the_methods_table_of_start_tokens_is_the_recorded_one() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "bos.json").read_text())
    page = (ROOT / "docs" / "method.md").read_text()
    for name, found in facts["perplexity"].items():
        assert f"| {name} | {found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f}) |" in page
    windows = f"{facts['held_out_windows']} windows of {facts['positions']} tokens"
    assert windows in page
    assert f"calibrated on {facts['calibration_windows']} windows" in " ".join(page.split())


def test_the_readmes_zero_shot_accuracies_are_the_recorded_ones() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "zero_shot.json").read_text())
    assert zero_shot.table(facts) in (ROOT / "README.md").read_text()


def test_the_readmes_table_of_recovery_is_the_recorded_one() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text())
    assert recovery.table(facts) in (ROOT / "README.md").read_text()


def test_the_table_of_quantization_is_the_recorded_one() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "quantization.json").read_text())
    assert quantization.table(facts) in (ROOT / "README.md").read_text()
    page = " ".join((ROOT / "docs" / "quantization.md").read_text().split())
    assert [words for words in quantization.sentences(facts) if words not in page] == []


def test_the_readmes_speed_of_pruned_models_is_the_recorded_one() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert speed.table(facts) in readme
    assert speed.reasons(facts) in readme
    assert f"differ by up to {facts['noise']:.0%} between rounds" in " ".join(readme.split())
    dense = facts["parts"][0]["models"]["dense"]
    for phase, words in (("reading", "of the time of reading"), ("writing", "of that of writing one token")):
        share = dense[phase]["attention"] / sum(dense[phase].values())
        assert f"{share:.0%} {words}" in " ".join(readme.split())


def test_what_the_readme_says_of_llama_cpp_was_measured() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "llama_cpp.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert llama.table(facts) in readme
    for words in llama.words(facts):
        assert words in " ".join(readme.split()), words
    prompts = len(llama.PROMPTS)
    for kind in llama.EXACT:
        assert facts["types"][kind]["same_tokens"] == [facts["new_tokens"]] * prompts


def test_the_page_on_exports_table_of_families_is_the_recorded_one() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "llama_families.json").read_text())
    assert set(facts) == set(families.MIXED), "all but experts and images, of which the page says that"
    assert llama_families.table(facts) in (ROOT / "docs" / "export.md").read_text()


def test_the_page_on_export_names_all_types() -> None:
    page = (ROOT / "docs" / "export.md").read_text()
    assert {*re.findall(r"`(auto|b?f\d+|i?q\d\w+)`", page.partition("## Types")[2].partition("## What")[0])} == {*TYPES}


def test_what_the_page_on_scale_says_was_measured() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    page = (ROOT / "docs" / "scale.md").read_text()
    for table in (scale.table(facts), scale.foreseen(facts), scale.settling(facts)):
        assert table in page
    for words in (scale.spared(facts), scale.others(facts), f"with the power {scale.power(facts)[0]:.2f} of"):
        assert words in " ".join(page.split())


def test_what_the_page_on_scale_predicts_is_what_the_cost_model_says() -> None:
    assert scale.far() in (ROOT / "docs" / "scale.md").read_text()


def test_the_readmes_cost_of_repair_is_the_recorded_one() -> None:
    repair = json.loads((ROOT / "benchmarks" / "results" / "repair.json").read_text())["results"]["sequential repair"]
    figures = (
        f"Repair takes {repair['to_scoring']:.2f} of the scoring's time ({repair['seconds_per_window']:.1f} s a window"
    )
    assert figures in (ROOT / "README.md").read_text()


def test_the_readmes_speed_figures_are_the_recorded_ones() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "scoring.json").read_text())["results"]
    readme = (ROOT / "README.md").read_text()
    for variant, result in results.items():
        figures = [f"{result['seconds_per_window']:.1f} s", f"{result['peak_bytes_above_weights'] / 1e9:.2f} GB"]
        if variant != "papers":
            figures += [f"{result[name]:.2f}" for name in ("time_ratio", "memory_ratio", "share_of_product_speed")]
        for figure in figures:
            assert figure in readme, (variant, figure)
