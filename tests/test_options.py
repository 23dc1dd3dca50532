"""One config a command: options declared once, read from flags, files and records, and refused when they are wrong."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hifiprune.cli.app import app
from hifiprune.cli.flags import flags_of, merged, upon_preset
from hifiprune.config.bench import BenchConfig
from hifiprune.config.evaluate import EvaluateConfig
from hifiprune.config.files import from_dict, read_config, to_dict
from hifiprune.config.groups import AllocationConfig, Budget, ComputeConfig, CriterionOptions
from hifiprune.config.options import declared_options
from hifiprune.config.prune import PruneConfig, ScoreConfig, TableConfig
from hifiprune.config.recover import TRAININGS, RecoverConfig, TrainingConfig
from hifiprune.config.study import AblateConfig, CompareConfig
from hifiprune.config.texts import Calibration, Text
from hifiprune.errors import UserError
from tests.commands import refused, run

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]
CONFIGS: list[type] = [
    PruneConfig,
    ScoreConfig,
    TableConfig,
    RecoverConfig,
    AblateConfig,
    BenchConfig,
    EvaluateConfig,
    CompareConfig,
]
UNUSUAL = PruneConfig(
    Budget(neuron_ratio=0.3),
    Calibration("a.txt", 7, 33, 5, "stream", "body", (("self", 0.25),), bos=False, prompts="c.txt"),
    "fisher",
    AllocationConfig("table", 0.5, Path("widths.json")),
    "none",
    16,
    Path("scores.safetensors"),
    "hfprune",
    CriterionOptions(0.1, 2.0, 0.05, 3, 4),
    0.99,
    bias_compensation=True,
    repair_steps=7,
    repair_minutes=2.5,
    compute=ComputeConfig("cpu", "float64", 3, True, "eager", False, "/scratch", deterministic=True),
    layout="remote",
    shard_size="1GB",
    overwrite=True,
    dry_run=True,
)


def test_unusual_is_unusual_in_every_option() -> None:
    usual = from_dict(PruneConfig, {"budget": {"ratio": 0.2}, "calibration": {"source": "x"}, "options": {}})
    for option in declared_options(PruneConfig):
        one, two = UNUSUAL, usual
        for name in option.path:
            one, two = getattr(one, name), getattr(two, name)
        assert one != two or option.name in ("width", "max_size"), option.path  # one budget at a time


@pytest.mark.parametrize(
    "config",
    [
        UNUSUAL,
        ScoreConfig(),
        ScoreConfig(Calibration("x"), options=CriterionOptions(0.5)),
        RecoverConfig(TrainingConfig(target_modules=("a", "b"), max_steps=3), "dense", report_to="wandb"),
    ],
)
def test_plain_data_and_back(config: Any) -> None:
    facts = json.loads(json.dumps(to_dict(config)))
    assert from_dict(type(config), facts) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_has_bounds_and_every_option_says_what_it_is(config: type) -> None:
    for option in declared_options(config):
        assert option.option.help.endswith("."), option.path
        if option.kind in (int, float):
            assert option.option.bounds, option.path
            assert option.option.bounds.whole == (option.kind is int), option.path


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"budget": {"ratio": 20}}, "ratio 20 must lie in (0, 1); did you mean 0.2?"),
        ({"budget": {"ratio": "0.2"}}, "budget.ratio: Input should be a valid number, not '0.2'"),
        ({"budget": {}}, "give exactly one of --ratio, --neuron-ratio, --width, --max-size; given: none"),
        ({"budget": {"ratio": 0.2, "width": 9}}, "given: ratio, width"),
        ({"budgte": {}}, "'budgte' is not an option; known are budget, calibration"),
        ({"budgte": {}}, "did you mean 'budget'?"),
        ({"budget": {"ratoi": 0.2}}, "'budget.ratoi' is not an option"),
        ({"num_samples": 3}, "did you mean 'calibration.num_samples'?"),
        ({"calibration": {"num_samples": 3}}, "'--calibration' is missing"),
        ({"calibration": "x.txt"}, "calibration must be a mapping of names to values"),
        ({"round_to": 2.5}, "round_to: Input should be a valid integer, not 2.5"),
        ({"steps": 2}, "'steps' is not an option; known are budget, calibration, "),
        ({"allocation": {"method": "searched"}}, "'searched' is not known; known are uniform, global"),
        ({"allocation": {"trials": 64}}, "'allocation.trials' is not an option; known are method, floor"),
        ({"allocation": {"method": "golbal"}}, "allocation 'golbal' is not known"),
        ({"allocation": {"method": "golbal"}}, "did you mean 'global'?"),
        ({"repair": "rigde"}, "did you mean 'ridge'?"),
        ({"compute": {"stream": "yes"}}, "compute.stream: Input should be a valid boolean, not 'yes'"),
    ],
)
def test_data_that_is_no_config(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_dict(PruneConfig, {"budget": {"width": 8}} | facts, "file.yaml")
    assert message in str(refusal.value)


def test_yaml_and_json_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(to_dict(UNUSUAL)))
    (tmp_path / "b.yaml").write_text("budget: {ratio: 2e-1}\ncompute:\n  stream: true\n  # how much\n  batch_size: 4\n")
    assert from_dict(PruneConfig, read_config(tmp_path / "a.json", "prune")) == UNUSUAL
    compute = ComputeConfig(stream=True, batch_size=4)
    assert from_dict(PruneConfig, read_config(tmp_path / "b.yaml", "prune")) == PruneConfig(
        Budget(0.2), compute=compute
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config file cannot be read: No such file or directory"),
        (b"\xff\xfe", "--config file cannot be read: "),
        (b"a: [", "--config file is neither YAML nor JSON: "),
        (b"a: &x [1, 1]\nb: [*x, *x]", "--config file has aliases"),
        (b"a: " + b"1" * 10**6, "--config file has 1,000,003 bytes, and options at most 1,000,000"),
        (b"- a", "file holds no options"),
        (b"", "file holds no options"),
        (
            b'{"format": "hifiprune-run-1", "command": "score"}',
            "file is of a run of 'score', and the command is 'prune'",
        ),
        (b'{"format": "hifiprune-run-1", "command": "prune"}', "file was changed since hifiprune wrote it"),
    ],
)
def test_files_that_hold_no_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("file").write_bytes(text)
    with pytest.raises(UserError) as refusal:
        read_config(Path("file"), "prune")
    assert str(refusal.value).startswith(message)


def test_of_a_run_its_output_is_not_taken(tmp_path: Path) -> None:
    run = {"format": "hifiprune-run-1", "command": "prune"}
    arguments = {"model": "m", "output": "o", "overwrite": True, "dry_run": True, "steps": 2}
    (tmp_path / "run.json").write_text(json.dumps(run | {"arguments": arguments}))
    assert read_config(tmp_path / "run.json", "prune") == {"model": "m", "steps": 2}


FILE = {"budget": {"ratio": 0.2, "width": None}, "calibration": {"source": "a", "mixed": [["b", 0.5]], "seed": 5}}
COMPUTE = {"compute": {"batch_size": 2, "stream": True}}


@pytest.mark.parametrize(
    ("facts", "given", "expected"),
    [
        ({}, {"ratio": 0.1}, PruneConfig(Budget(0.1))),
        (FILE, {}, PruneConfig(Budget(0.2), Calibration("a", seed=5, mixed=(("b", 0.5),)))),
        (FILE, {"width": 8, "calibration": ["c"]}, PruneConfig(Budget(width=8), Calibration("c", seed=5))),
        (
            FILE | COMPUTE,
            {"batch_size": 3, "calibration": ["c:1", "d:3"], "allocation": "global"},
            PruneConfig(
                Budget(0.2),
                Calibration("c", seed=5, mixed=(("d", 0.75),)),
                allocation=AllocationConfig("global"),
                compute=ComputeConfig(batch_size=3, stream=True),
            ),
        ),
        ({}, {"width": 8, "num_samples": 9, "seed": 3}, PruneConfig(Budget(width=8), options=CriterionOptions(seed=3))),
        (FILE, {"alpha": 0.5}, PruneConfig(Budget(0.2), Calibration("a", seed=5, mixed=(("b", 0.5),)),
                                           options=CriterionOptions(0.5, seed=5))),
        (
            {"budget": {"width": 8}},
            {"calibration": ["x"], "seed": 7},
            PruneConfig(Budget(width=8), Calibration("x", seed=7), options=CriterionOptions(seed=7)),
        ),
    ],
)  # fmt: skip
def test_flags_override_files(facts: dict[str, Any], given: dict[str, Any], expected: PruneConfig) -> None:
    before = json.dumps(facts)
    assert from_dict(PruneConfig, merged(PruneConfig, facts, given)) == expected
    assert json.dumps(facts) == before


@pytest.mark.parametrize("name", TRAININGS)
def test_flags_override_files_and_files_presets(name: str) -> None:
    facts = upon_preset(RecoverConfig.presets, name, {"training": {"lora_r": 5, "seed": 6}, "control": True})
    found = from_dict(RecoverConfig, merged(RecoverConfig, facts, {"seed": 7, "target_modules": "a, b,c"}))
    training = replace(TRAININGS[name], lora_r=5, seed=7, target_modules=("a", "b", "c"))
    assert found == RecoverConfig(training, control=True)


def test_a_part_of_a_group_changes_the_default_of_the_config_and_not_of_the_group() -> None:
    facts = merged(AblateConfig, {"text": {"seq_len": 9}}, {"scores": ["x"], "max_windows": 3, "batch_size": 2})
    found = from_dict(AblateConfig, facts)
    assert found == AblateConfig(
        (Path("x"),), Text("python-docs", 9, 3), compute=ComputeConfig(dtype="float32", batch_size=2)
    )
    defaults = {option.name: option.default for option in declared_options(AblateConfig)}
    assert (defaults["source"], defaults["seq_len"], defaults["max_windows"]) == ("python-docs", 512, 4)


def test_what_must_be_given_is_named_as_a_flag() -> None:
    with pytest.raises(UserError, match=r"^'--scores' is missing: give it on the command line"):
        from_dict(AblateConfig, {})
    with pytest.raises(UserError, match=r"^give exactly one of --ratio, --neuron-ratio, --width, --max-size"):
        from_dict(PruneConfig, {})


def test_a_config_has_flags_for_those_options_of_a_group_that_it_uses() -> None:
    names = flags_of(RecoverConfig).keys()
    assert names >= {"device", "dtype", "attention", "per_device_batch_size"}
    assert not names & {"batch_size", "stream", "recompute", "scratch"}


def test_an_output_is_never_its_own_config_nor_around_it(world: Path, tmp_path: Path) -> None:
    words = ("prune", world / "dense", "--output", tmp_path / "small", "--width", 24, "--criterion", "magnitude")
    assert run(*words).code == 0
    record = tmp_path / "small" / "run.json"
    again = ("prune", "--config", record, "--output", tmp_path / "small", "--overwrite")
    refused(run(*again), f"contains the input {record}")
    options = tmp_path / "options.yaml"
    options.write_text("criterion: magnitude")
    refused(run("score", world / "dense", "--config", options, "--output", options, "--overwrite"), "is the input")
    assert options.read_text() == "criterion: magnitude"


def test_configs_are_light_to_import() -> None:
    code = "import sys, hifiprune.config.prune, hifiprune.config.recover, hifiprune.config.files; "
    code += "import hifiprune.cli.flags as f; "
    code += "f.flags_of(hifiprune.config.prune.PruneConfig); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_is_repeated_exactly_from_its_record(world: Path, tmp_path: Path) -> None:
    text = (
        "--calibration",
        world / "calibration.txt",
        "--num-samples",
        5,
        "--seq-len",
        16,
        "--seed",
        3,
        "--batch-size",
        2,
    )
    flags = ("--neuron-ratio", 0.4, "--allocation", "global", "--round-to", 1, "--floor", 0.5, *text)
    assert run("prune", world / "dense", "--output", tmp_path / "old", *flags).code == 0
    record = tmp_path / "old" / "run.json"
    again = run("prune", "--config", record, "--output", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    decided = Path("hifiprune") / "plan.json"
    assert (tmp_path / "again" / decided).read_bytes() == (tmp_path / "old" / decided).read_bytes()
    for name in ("model.safetensors", "hifiprune/scores.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "old" / name).read_bytes(), name
    before = json.loads(record.read_text())["arguments"]
    assert again.json["arguments"] == before | {"output": str(tmp_path / "again")}
    other = run("prune", "--config", record, "--output", tmp_path / "other", "--width", 20, "--seed", 4, "--json")
    assert other.json["results"]["asked"] == "width 20"
    assert other.json["arguments"]["calibration"]["seed"] == other.json["arguments"]["options"]["seed"] == 4


def test_papers_presets_are_repeated_exactly_too(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 16)
    for preset in ("hfprune", "sdmprune"):
        words = ("prune", world / "dense", "--output", tmp_path / preset, "--width", 24, "--preset", preset, *text)
        assert run(*words).code == 0
        copy = tmp_path / f"{preset}-again"
        again = run("prune", "--config", tmp_path / preset / "run.json", "--output", copy)
        assert again.code == 0, again.err
        for name in ("model.safetensors", "hifiprune/scores.safetensors", "hifiprune/plan.json"):
            assert (copy / name).read_bytes() == (tmp_path / preset / name).read_bytes(), name


def test_a_whole_command_in_a_file(world: Path, tmp_path: Path) -> None:
    (tmp_path / "score.yaml").write_text(
        f"model: {world / 'dense'}\noutput: {tmp_path / 'scores'}\ncriterion: magnitude\n"
    )
    assert run("score", "--config", tmp_path / "score.yaml").code == 0
    refused(run("score", "--config", tmp_path / "score.yaml"), "exists already")
    assert run("score", "--config", tmp_path / "score.yaml", "--output", tmp_path / "two").code == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "scores").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", "m", "--output", "o"), "--ratio, --neuron-ratio, --width, --max-size; given: none"),
        (("prune", "--output", "o", "--ratio", "0.2"), "missing argument 'MODEL'"),
        (("prune", "m", "--ratio", "0.2"), "missing option '--output'"),
        (("prune", "--config", "c.yaml", "--output", "o"), "'MODEL' is missing: give it on the command line, or in"),
        (("prune", "m", "--config", "c.yaml"), "'--output' is missing: give it on the command line, or in the file"),
        (("prune", "m", "--config", "none.yaml", "--output", "o"), "none.yaml cannot be read: No such file"),
        (("prune", "m", "--output", "o", "--ratio", "0.2", "--repair", "rigde"), "repair 'rigde' is not known"),
        (("prune", "m", "--output", "o", "--ratio", "0.2", "--preset", "hfprun"), "did you mean 'hfprune'?"),
        (("score", "m", "--config", "c.yaml", "--output", "o"), "'budget' is not an option; known are calibration"),
    ],
)
def test_what_is_missing_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("budget: {ratio: 0.2}")
    refused(run(*words), message)


def test_flags_without_effect_are_told(world: Path, tmp_path: Path) -> None:
    words = ("prune", world / "dense", "--output", tmp_path / "out", "--width", 24, "--criterion", "magnitude")
    result = run(*words, "--num-samples", 9, "--sampler", "stream")
    assert result.code == 0, result.err
    assert "Ignored, since there is no --calibration: --num-samples, --sampler." in result.err


def test_help_shows_what_matters_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    long, short = run("prune", "--help").out, run("prune", "-h").out
    assert long == short
    panels = dict(re.findall(r"^╭─ (.+?) ─+╮\n(.*?)^╰", long, re.MULTILINE | re.DOTALL))
    flags = {name: re.findall(r"^│ +\*? *(--[\w-]+)", text, re.MULTILINE) for name, text in panels.items()}
    assert flags["Options"] == [
        "--output",
        "--ratio",
        "--calibration",
        "--criterion",
        "--allocation",
        "--repair",
        "--help",
    ]
    assert list(panels)[:3] == ["Arguments", "Options", "Widths"]
    assert "<bool>" not in long
    assert re.search(r"--num-samples.*\[default: 128\]", long)
    assert "entropy-square; fisher with --allocation global; or the preset's" in long


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_is_cut_off_at_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(command, "--help").out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    starred = set(re.findall(r"^│ \*  (--[\w-]+)", shown, re.MULTILINE))
    needed = {"compare": {"--output", "--calibration"}, "ablate": {"--scores"}, "recover": {"--data"}}
    needed["generate"] = {"--prompt"}
    needed["table"] = {"--output", "--scores", "--calibration"}
    outputs = {"--output"} if command in ("prune", "score", "export") else set()
    assert starred == needed.get(command, outputs)


def test_options_that_a_command_does_not_use_are_refused_in_files_too(world: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    words = ("evaluate", world / "dense", "--text", world / "held.txt", "--seq-len", 16, "--config", options)
    for group, name, value in (("compute", "scratch", "/tmp"), ("compute", "recompute", "true")):
        options.write_text(f"{group}: {{{name}: {value}}}")
        refused(run(*words), f"options.yaml: '{group}.{name}' has no effect on this command; leave it out")
    options.write_text("compute: {scratch: null, batch_size: 2}")
    assert run(*words).code == 0


def test_values_in_files_are_of_the_type_that_a_parameter_has(tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("model: 3")
    refused(
        run("score", "--output", "x", "--config", options), "--config: model: Input should be a valid string, not 3"
    )


def test_shells_complete_words() -> None:
    environment = {**os.environ, "_HIFIPRUNE_COMPLETE": "complete_bash"}
    for words, expected in {"prune --allocation g": "global", "prune --num-": "--num-samples", "sco": "score"}.items():
        line = f"hifiprune {words}"
        asked = environment | {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        code = "from hifiprune.cli.app import app; app(prog_name='hifiprune')"
        found = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=False)
        assert found.stdout.split() == [expected], found.stderr
