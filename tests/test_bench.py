"""Timing beside the dense model: what is written, what is counted, and what is told of the figures."""

import json
import math
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import hifiprune as hp
from hifiprune.commands.bench import told_apart
from hifiprune.engine.machine import Machine
from hifiprune.evaluation.speed import _timed_or_told, operations, write
from hifiprune.formatting import format_speedup
from hifiprune.results import Spread, Timing, Workload
from tests.commands import Interruption, refused, run
from tests.families import FORMS, ROUTED, tiny_model, tiny_tokens

SPEED = "hifiprune.evaluation.speed"
ABOUT = {"loading": 1.0, "threads": 2, "device": "cpu", "dtype": "float32", "peak_memory_bytes": 10}
stats: Any = pytest.importorskip("scipy.stats")
real = subprocess.run


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", FORMS + ROUTED)
def test_what_is_written_is_what_transformers_generates(
    variant: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, clock = tiny_model(variant), tiny_tokens(2, 7), [0.0]

    def forward(input_ids: torch.Tensor, **how: Any) -> Any:
        clock[0] += input_ids.shape[1]
        return model(input_ids=input_ids, **how)

    monkeypatch.setattr(f"{SPEED}._now", lambda _: clock[0])
    work = Workload(2, 7, 6, compiled)  # with the cache of a compiled run, not compiled
    written, first, later = write(model, forward, tokens, work)
    generator: Any = model
    generator.generation_config.eos_token_id = None
    theirs = generator.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(written, theirs[:, 7:])
    assert (first, later) == (7.0, 1.0), "a second a token that is read"


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "mistral"])
def test_operations_are_those_that_torch_counts(variant: str) -> None:
    model = tiny_model(variant)
    work = Workload(2, 24, 2)
    counted = operations(model, work)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tiny_tokens(2, 24), use_cache=False, logits_to_keep=1)
    config = model.config
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 4)
    masked = 2 * 2.0 * config.num_hidden_layers * width * 24 * 24  # eager attention computes what causality masks
    assert counted["first"] + masked == pytest.approx(counter.get_total_flops(), rel=0.02)
    dense, small = (operations(each, work)["later"] for each in (model, tiny_model(variant, intermediate_size=30)))
    assert dense - small == 2 * 2 * 3 * 3 * 10 * config.hidden_size, "2 sequences, 2 operations, 3 blocks of 3 maps"


@pytest.fixture
def pair(make_checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    return make_checkpoint("dense", intermediate_size=64), make_checkpoint("small", intermediate_size=40)


@pytest.mark.exhaustive  # fresh processes
def test_bench_times_models_in_turn_in_fresh_processes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("--lengths", "8,16", "--new-tokens", 3, "--rounds", 1, "--repeats", 2, "--output", tmp_path / "out")
    result = run("bench", *pair, *words)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    results = record["results"]
    assert record["command"] == "bench"
    assert [each["workload"]["length"] for each in results["workloads"]] == [8, 16]
    dense, small = (results["models"][str(path)] for path in pair)
    assert dense["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(pair[0]).parameters())
    assert small["weight_bytes"] == (pair[1] / "model.safetensors").stat().st_size
    assert dense["unaligned"] == []
    assert small["peak_memory_bytes"] > 1e7
    assert "widths such as 40 are no multiples of 64, which many kernels want; the nearest is 64" in result.out
    assert "prefill 1 x 8 tokens, decode 3" in result.out
    assert "decode, tokens a second" in result.out
    assert result.out.count("not significant (") == 4, "one round tells nothing, of either part"
    for word in ("read,", "written", "%", "to 1.", "to 0."):
        assert word not in result.out


def test_figures_are_medians_over_rounds_and_gains_those_of_one_round(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, order = random.Random(0), []
    seconds: dict[str, list[list[float]]] = {"dense": [], "small": []}

    def process(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if SPEED not in command:
            return real(command, **how)
        name = Path(json.loads(command[-1])["name"]).name
        order.append(name)
        speed = 1.0 if name == "dense" else 0.8
        found = [speed * chance.uniform(0.9, 1.1) for _ in range(3)]
        seconds[name].append(found)
        facts = {"timings": [{"first": found, "later": found}], **ABOUT}
        return subprocess.CompletedProcess(command, 0, "words\n" + json.dumps(facts), "")

    monkeypatch.setattr("subprocess.run", process)
    record = hp.bench(str(pair[0]), [str(pair[1])], hp.BenchConfig(lengths=(8,), new_tokens=4, rounds=5))
    assert order == ["dense", "small"] * 5
    (found,) = record.results.workloads
    rounds = {name: [median(each) for each in own] for name, own in seconds.items()}
    gains = [dense / small for dense, small in zip(rounds["dense"], rounds["small"], strict=True)]
    row = found.models[str(pair[1])].first
    assert row.seconds.median == median(rounds["small"])
    assert row.speedup == Spread(median(gains), min(gains), max(gains))
    assert row.told_apart == (stats.ttest_1samp([math.log(gain) for gain in gains], 0).pvalue < 0.05)
    hoped = 1 / row.promised
    assert row.share == pytest.approx((1 - 1 / median(gains)) / (1 - hoped))
    dense, small = (operations(AutoModelForCausalLM.from_pretrained(path), Workload(1, 8, 4))["first"] for path in pair)
    assert row.promised == dense / small
    spread = max((max(each) - min(each)) / median(each) for each in rounds.values())
    assert found.noise == pytest.approx(spread)


@pytest.mark.parametrize(
    ("seconds", "rounds", "remark"),
    [
        ([(1.0, 0.8), (1.01, 1.5), (1.02, 0.9)], 3, "timings of one model differ by up to 78%"),
        ([(1.0, 0.8), (1.01, 1.5), (1.02, 0.9)], 3, "small is faster in some rounds and slower in others"),
        ([(1.0, 0.8)], 1, "1 round does not tell how noisy the machine is"),
        ([(1.0, 0.8), (1.01, 0.81), (1.02, 0.8)], 3, ""),
    ],
)
def test_a_machine_too_noisy_to_tell_is_told(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    seconds: list[tuple[float, float]],
    rounds: int,
    remark: str,
) -> None:
    left = iter([each for both in seconds for each in both])

    def process(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if SPEED not in command:
            return real(command, **how)
        found = [next(left)]
        facts = {"timings": [{"first": found, "later": found}], **ABOUT}
        return subprocess.CompletedProcess(command, 0, json.dumps(facts), "")

    monkeypatch.setattr("subprocess.run", process)
    record = hp.bench(str(pair[0]), [str(pair[1])], hp.BenchConfig(lengths=(8,), new_tokens=4, rounds=rounds))
    remarks = [each for each in record.results.remarks if "multiples" not in each]
    assert any(remark in each for each in remarks) if remark else remarks == []


def test_an_interrupted_bench_goes_on(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def process(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if SPEED not in command:
            return real(command, **how)
        turns.append(Path(json.loads(command[-1])["name"]).name)
        if len(turns) == 4:
            raise Interruption
        facts = {"timings": [{"first": [1.0], "later": [float(len(turns))]}], **ABOUT}
        return subprocess.CompletedProcess(command, 0, json.dumps(facts), "")

    monkeypatch.setattr("subprocess.run", process)
    words = ("bench", *pair, "--lengths", 8, "--new-tokens", 4, "--rounds", 3, "--output", tmp_path / "out", "--json")
    with pytest.raises(Interruption):
        run(*words)
    result = run(*words)
    assert result.code == 0, result.err
    assert turns == ["dense", "small", "dense", "small", "small", "dense", "small"]
    found = result.json["results"]["workloads"][0]["models"][str(pair[0])]["later"]["seconds"]
    assert found == {"median": 3.0, "low": 1.0, "high": 6.0}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_where_compiling_does_not_work_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> Any:
        def forward(**how: Any) -> Any:
            raise RuntimeError("no C++ compiler\nSet THIS and THAT for more")

        return forward

    monkeypatch.setattr("torch.compile", broken)
    model = tiny_model("llama")
    found = [_timed_or_told(model, Workload(1, 8, 3, compiled), 1) for compiled in (False, True)]
    assert set(found[0]) == {"first", "later"}
    assert found[1] == {"trouble": "RuntimeError: no C++ compiler"}


def test_a_workload_that_could_not_be_compiled_is_left_out(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if SPEED not in command:
            return real(command, **how)
        facts = {"timings": [{"first": [1.0], "later": [1.0]}, {"trouble": "no compiler"}], **ABOUT}
        return subprocess.CompletedProcess(command, 0, json.dumps(facts), "")

    monkeypatch.setattr("subprocess.run", process)
    result = run("bench", *pair, "--lengths", 8, "--new-tokens", 4, "--compile")
    assert result.code == 0, result.err
    assert "torch.compile does not work here" in result.out
    assert ", compiled" not in result.out
    assert "float32 on cpu, 2 threads" in result.out.replace("\n", " ")


def test_what_is_compiled_is_timed() -> None:
    compiler, model = torch.compile, tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", lambda each: compiler(each, backend="eager"))
        found = _timed_or_told(model, Workload(2, 8, 3, compiled=True), 1)
    assert {name: len(seconds) for name, seconds in found.items()} == {"first": 1, "later": 1}


def test_what_cannot_be_timed_is_refused(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("bench", *pair, "--lengths", 64), "64 tokens and 64 new ones exceed the 64 positions")
    refused(run("bench", pair[0], pair[0]), "would be measured twice")
    refused(run("bench", *pair, "--lengths", "many"), "lengths 'many' is no whole number")
    refused(
        run("bench", *pair, "--batch-sizes", 0, "--lengths", 8, "--new-tokens", 4), "batch-sizes 0 must be at least 1"
    )
    refused(run("bench", *pair, "--new-tokens", 1), "new-tokens 1 must be at least 2")
    wrong = ("--lengths", 8, "--new-tokens", 4, "--rounds", 1, "--attention", "flash_atention_2")
    refused(run("bench", *pair, *wrong), "did you mean 'flash_attention_2'?")

    def process(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if SPEED not in command:
            return real(command, **how)
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no compiler")

    monkeypatch.setattr("subprocess.run", process)
    message = "could not be timed: RuntimeError: no compiler"
    refused(run("bench", *pair, "--lengths", 8, "--new-tokens", 4), message, code=1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rounds", [2, 3, 5, 12])
def test_a_difference_is_told_apart_as_students_test_does(rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    ratios = [chance.lognormvariate(0.1 * seed, 0.1) for _ in range(rounds)]
    one_side = len({ratio > 1 for ratio in ratios}) == 1
    expected = one_side and stats.ttest_1samp([math.log(ratio) for ratio in ratios], 0).pvalue < 0.05
    if rounds <= 10 or not expected:  # beyond, ours is the stricter
        assert told_apart(ratios) == expected
    assert told_apart([1 / ratio for ratio in ratios]) == told_apart(ratios)


def test_noise_is_not_called_a_speed_up(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([1.0, 0.75, 1.0, 0.97, 1.0, 0.80])  # faster in every round, by how much nobody knows

    def process(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if SPEED not in command:
            return real(command, **how)
        later = 1.0 if Path(json.loads(command[-1])["name"]).name == "dense" else 1.9
        facts = {"timings": [{"first": [next(seconds)], "later": [later]}], **ABOUT}
        return subprocess.CompletedProcess(command, 0, json.dumps(facts), "")

    monkeypatch.setattr("subprocess.run", process)
    monkeypatch.setattr(Machine, "now", lambda: Machine(2, 2, 0.25, 1.5))
    result = run("bench", *pair, "--lengths", 8, "--new-tokens", 4, "--output", tmp_path / "timed")
    assert result.code == 0, result.err
    told = (
        "The machine was busy before the first timing (others use 1.5 of 2 cores, 25% of the CPU time wanted was had)"
    )
    assert told in result.err
    assert told in result.out
    first, later = (line for line in result.out.splitlines() if "  speed-up" in line)
    assert "not significant (1." in first
    assert re.search(r"0\.53, 0\.53 to 0\.53 \(1\.\d\d\)", later), "slower for certain, and no share of a saving"
    found = json.loads((tmp_path / "timed" / "run.json").read_text())["results"]["workloads"][0]["models"][str(pair[1])]
    assert found["first"]["speedup"] == {"median": 1.25, "low": 1 / 0.97, "high": 1 / 0.75}, "raw figures stay"
    assert found["later"]["share"] < 0


def test_a_share_of_next_to_nothing_is_not_told() -> None:
    seconds, speedup = Spread(1.0, 1.0, 1.0), Spread(1.1, 1.09, 1.11)
    row = Timing(seconds, 1e9, speedup, promised=1.01, share=9.1, told_apart=True)
    assert format_speedup(row) == ("1.10, 1.09 to 1.11", "")
    assert format_speedup(replace(row, promised=1.2, share=0.55)) == ("1.10, 1.09 to 1.11", "55%")
    assert format_speedup(replace(row, told_apart=False)) == ("not significant", "")
    old = Timing(seconds, 1e9, Spread(1.5, 1.5, 1.5), promised=1.6, share=0.9)
    assert format_speedup(old) == ("not significant", ""), "records of one round, before that was written down"
