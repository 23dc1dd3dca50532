"""Every next step that commands print can be pasted into a shell, and works on what is there."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hifiprune.commands.next_steps import calibration_flags, cut_flags, free_name, program
from tests.commands import Result, run

NEXT = re.compile("^Next: (.*)$", re.MULTILINE)
NOT_RUN = ("llama-cli", "--upload")
"""Steps that need another program, or somebody's account on the hub."""
SMALL = "--num-samples 4 --seq-len 24 --sampler stream"


@pytest.fixture
def place(world: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dense model and texts whose names a shell must have quoted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hifiprune.reports.plots.draw_comparison", lambda *_: None)
    monkeypatch.setattr("hifiprune.reports.plots.draw_ablation", lambda *_: None)
    make_checkpoint("my dense", intermediate_size=1024)
    words = (world / "calibration.txt").read_text()
    rows = [json.dumps({"text": words[start : start + 90]}) for start in range(0, 1800, 90)]
    (tmp_path / "it's.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.txt").write_text((world / "held.txt").read_text())
    return tmp_path


def steps_of(result: Result) -> list[list[str]]:
    """Every next step, as a shell would read it; what is not to be pasted is not told as one."""
    assert result.code == 0, result.err
    lines = NEXT.findall(result.out)
    for line in lines:
        assert not re.search(r"\b(DIR|SOURCE|FILE|DENSE|MODEL)\b", line), line
    return [shlex.split(line) for line in lines]


COMMANDS = f"""
inspect 'my dense'
score 'my dense' --output 'scores 1' --calibration "it's.jsonl" {SMALL}
prune 'my dense' --output dry --ratio 0.2 --calibration "it's.jsonl" {SMALL} --dry-run
prune 'my dense' --output small --ratio 0.2 --round-to 8 --calibration "it's.jsonl" {SMALL}
prune 'my dense' --output docs --ratio 0.2 --calibration python-docs {SMALL}
inspect small --deploy
evaluate small --against 'my dense' --text held.txt --seq-len 24 --card --output 'what was measured'
evaluate docs --text held.txt --seq-len 24 --card
push small me/small
recover small --output better --data "it's.jsonl" --max-steps 1 --seq-len 24 --gradient-accumulation-steps 1 --lora-r 4
ablate 'my dense' --scores 'scores 1' --output removed --text held.txt --seq-len 24 --neurons 3 --groups 0
compare 'my dense' --output compared --criteria magnitude,random --ratios 0.1 --seeds 1 --text held.txt
  --calibration "it's.jsonl" {SMALL}
demo --model 'my dense' --output shown --num-samples 4 --seq-len 24
"""


def test_every_next_step_works(place: Path) -> None:
    told: set[str] = set()
    for line in COMMANDS.replace("\n  ", " ").strip().splitlines():
        steps = steps_of(run(*shlex.split(line)))
        assert len(steps) == 1, line
        told.add(steps[0][1])
        for called, *step in steps:
            assert called == "hifiprune"
            if set(NOT_RUN).isdisjoint(step):
                result = run(*step)
                assert result.code == 0, f"{line}\n-> {shlex.join(step)}\n{result.err}"
                steps_of(result)
    assert told == {"prune", "evaluate", "inspect", "report", "push"}
    assert {"what was measured", "report.html", "smaller", "smaller-2", "dry"} <= {
        path.name for path in place.iterdir()
    }


def test_the_program_is_called_as_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an environment that was not activated by its path, else by its name."""
    module = [sys.executable, "-m", "hifiprune"]
    cases = {".venv/bin/hifiprune": [".venv/bin/hifiprune"], "/a/hifiprune/__main__.py": module}
    monkeypatch.setenv("PATH", str(tmp_path))
    for started, words in cases.items():
        monkeypatch.setattr("sys.argv", [started])
        assert program() == words
    (tmp_path / "hifiprune").touch(mode=0o700)
    assert program() == ["hifiprune"]


def test_what_was_written_is_told(place: Path) -> None:
    made = run("prune", "my dense", "--output", "small", "--ratio", 0.2, "--criterion", "magnitude")
    assert made.code == 0, made.err
    result = run("evaluate", "small", "--text", "held.txt", "--seq-len", 24, "--card", "--output", "measured")
    assert "Wrote measured, small/README.md.\n" in result.out
    assert "Next: hifiprune report small measured --output report.html" in result.out


def test_names_and_flags_of_next_steps(place: Path) -> None:
    assert free_name("smaller") == "smaller"
    (place / "smaller").mkdir()
    assert free_name("smaller") == "smaller-2"
    assert cut_flags("my dense") == ["--ratio", "0.2"]
    assert cut_flags("my dense", roundings=(4096,)) == []
    assert cut_flags("owner/model", roundings=(256,)) == ["--ratio", 0.2, "--round-to", 256]
    facts = {"source": "a b", "mixed": [["c", 0.3]], "num_samples": 4, "seq_len": 8, "seed": 0, "sampler": "auto"}
    words = ["--calibration", "a b", "--calibration", "c:0.3", "--num-samples", 4, "--seq-len", 8]
    assert calibration_flags(facts | {"text_column": None}) == words
    assert calibration_flags(facts | {"source": "/dev/fd/63", "text_column": None}) == [], "which is gone by then"
