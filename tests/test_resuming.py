"""Scoring that is interrupted, and scoring that is shared out among processes: the outcome is that of one quiet run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed

import hifiprune as hp
from hifiprune.config import CriterionOptions
from hifiprune.io import safetensors_stream
from hifiprune.io.atomic import replacing
from hifiprune.io.distributed import follow_first, leave, rank
from hifiprune.io.output_paths import check_target
from hifiprune.io.pass_checkpoint import PassCheckpoint
from hifiprune.io.resume import ResumeFolder
from hifiprune.plan import Plan
from hifiprune.scores import Scores
from hifiprune.scoring.score import Request, score_all
from tests.commands import Interruption, refused, run
from tests.families import tiny_model, tiny_tokens
from tests.processes import command, forked

TEXT = ("--num-samples", 8, "--seq-len", 24)


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are kept after every batch."""
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.COST", float("inf"))


@contextmanager
def stopping_after(batches: int, counts: list[int] | None = None) -> Iterator[None]:
    """Have scoring interrupted once so many batches are done; count those of every pass."""
    left = [batches]

    def track(items: Iterable[Any], what: str) -> Iterator[Any]:
        items = list(items)
        if counts is not None:
            counts.append(len(items))
        for item in items:
            if left[0] == 0:
                raise Interruption
            left[0] -= 1
            yield item

    with patch("hifiprune.scoring.accumulate.track", track):
        yield


def keeper_in(folder: Path, model: Any = None) -> PassCheckpoint:
    """For states in a folder."""
    resume_folder = ResumeFolder(folder / "unfinished")
    return PassCheckpoint(resume_folder.of(model or tiny_model("llama"), "hash"))


def equal(ours: Scores, theirs: Scores) -> bool:
    """Whether they are the same to the last bit."""
    assert ours.objective == theirs.objective
    return all(torch.equal(one, other) for one, other in zip(ours.values, theirs.values, strict=True))


@pytest.mark.parametrize(
    ("names", "stop", "rest"),
    [
        (["hfprune", "fisher", "flap", "minitron"], 3, [3]),
        (["self-distillation"], 2, [4, 6]),  # in its first pass
        (["self-distillation", "cross-entropy"], 10, [0, 2]),  # in its second
    ],
)
def test_what_an_interrupted_pass_has_done_is_not_done_again(
    tmp_path: Path, every_batch: None, names: list[str], stop: int, rest: list[int]
) -> None:
    model, windows = tiny_model("llama"), tiny_tokens(6, 9)
    requests: list[Request] = [(name, CriterionOptions()) for name in names]
    whole = score_all(model, windows, requests)
    with pytest.raises(Interruption), stopping_after(stop):
        score_all(model, windows, requests, keeper=keeper_in(tmp_path))
    counts: list[int] = []
    with stopping_after(99, counts):
        resumed = score_all(model, windows, requests, keeper=keeper_in(tmp_path))
    assert counts == rest
    assert all(equal(ours, theirs) for ours, theirs in zip(resumed, whole, strict=True))


def test_states_of_other_windows_models_and_batches_are_left_alone(tmp_path: Path, every_batch: None) -> None:
    model, windows, request = tiny_model("llama"), tiny_tokens(6, 9), [("hfprune", CriterionOptions())]
    score_all(model, windows, request, keeper=keeper_in(tmp_path))
    others: list[tuple[Any, dict[str, Any]]] = [
        (windows.flip(0), {}),
        (windows, {"batch_size": 2}),
        (windows, {"recompute": True}),
        (windows, {"keeper": keeper_in(tmp_path).of("step", 2)}),
        (windows, {"keeper": PassCheckpoint(ResumeFolder(tmp_path / "unfinished").of(model, "another hash"))}),
    ]
    for tokens, how in others:
        counts: list[int] = []
        found = {"keeper": keeper_in(tmp_path), "batch_size": 1, **how}
        with stopping_after(99, counts):
            score_all(model, tokens, request, **found)
        assert counts == [6 // found["batch_size"]]


def test_a_damaged_state_is_made_again(tmp_path: Path, every_batch: None, caplog: pytest.LogCaptureFixture) -> None:
    model, windows, request = tiny_model("llama"), tiny_tokens(4, 9), [("hfprune", CriterionOptions())]
    whole = score_all(model, windows, request, keeper=keeper_in(tmp_path))
    (state,) = (tmp_path / "unfinished" / "states").iterdir()
    state.write_bytes(state.read_bytes()[:-9])
    (again,) = score_all(model, windows, request, keeper=keeper_in(tmp_path))
    assert equal(again, whole[0])
    assert caplog.messages == [f"{state} is damaged and is made again."]


def test_scoring_goes_on_where_no_state_can_be_kept(
    tmp_path: Path, every_batch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise hp.RunError("the disk is full")

    monkeypatch.setattr(ResumeFolder, "write", full)
    model, windows, request = tiny_model("llama"), tiny_tokens(4, 9), [("hfprune", CriterionOptions())]
    (kept,) = score_all(model, windows, request, keeper=keeper_in(tmp_path))
    assert equal(kept, score_all(model, windows, request)[0])


def test_short_runs_leave_no_states(tmp_path: Path) -> None:
    score_all(tiny_model("llama"), tiny_tokens(4, 9), [("hfprune", CriterionOptions())], keeper=keeper_in(tmp_path))
    assert not any(tmp_path.iterdir())


def dying_in_state(number: int) -> None:
    """Have this process die in the middle of writing so many states."""
    writes = []

    def save_or_die(state: Any, path: Path) -> None:
        writes.append(path)
        if len(writes) == number:
            path.write_bytes(b"half a state")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(state, path)

    patch = pytest.MonkeyPatch()
    patch.setattr("hifiprune.io.pass_checkpoint.SECONDS_BETWEEN", 0.0)
    patch.setattr("hifiprune.io.pass_checkpoint.COST", float("inf"))
    patch.setattr("hifiprune.io.pass_checkpoint.save_file", save_or_die)


def test_a_killed_run_goes_on_to_the_same_scores(world: Path, tmp_path: Path) -> None:
    flags = ["score", world / "dense", "--calibration", world / "calibration.txt", *TEXT]
    quiet = run(*flags, "--output", tmp_path / "quiet.safetensors")
    assert quiet.code == 0, quiet.err
    words = [*flags, "--output", tmp_path / "killed.safetensors"]
    killed = forked(tmp_path / "told", command(*words, before=lambda: dying_in_state(5)))
    assert killed.codes == [-signal.SIGKILL]
    resume_folder = tmp_path / "killed.safetensors.score-unfinished"
    assert resume_folder.is_dir()
    again = run(*words, "--json")
    assert again.code == 0, again.err
    assert again.json["reused_parts"] == 1
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "quiet.safetensors").read_bytes()
    assert not resume_folder.exists()


def dying_in_weights() -> None:
    """Have this process die in the middle of writing weights."""
    pour, pieces = safetensors_stream._pour, []

    def pour_or_die(file: Any, rows: Any) -> None:
        pieces.append(rows)
        if len(pieces) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        pour(file, rows)

    pytest.MonkeyPatch().setattr("hifiprune.io.safetensors_stream._pour", pour_or_die)


@pytest.mark.parametrize("how", ["cut", "repaired", "streamed"])
def test_a_run_killed_while_it_writes_starts_clean(
    world: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, how: str
) -> None:
    text = ("--calibration", world / "calibration.txt", *TEXT)
    flags = ["prune", world / "dense", "--width", 24, *text]
    if how == "cut":
        assert run("score", world / "dense", "--output", tmp_path / "scores", *text).code == 0
        flags = [*flags[:4], "--scores", tmp_path / "scores"]
    elif how == "streamed":
        flags += ["--stream", "--scratch", tmp_path]
    quiet = run(*flags, "--output", tmp_path / "quiet")
    assert quiet.code == 0, quiet.err
    before = {path.name for path in tmp_path.iterdir()}
    words = [*flags, "--output", tmp_path / "killed"]
    killed = forked(tmp_path_factory.mktemp("told") / "it", command(*words, before=dying_in_weights))
    assert killed.codes == [-signal.SIGKILL]
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left, "what was written so far, and the lock that nobody holds"
    assert all(name.startswith(".killed.") for name in left), "hidden, beside the output, which is not there"
    assert run(*words).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {*before, "killed"}, "nothing is left of it"
    for name in ("model.safetensors", "config.json", "hifiprune/plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()


def test_what_a_killed_process_was_about_to_replace_is_put_back(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcdefgh.partial"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "old").touch()
    other = tmp_path / ".out.v2.abcdefgh.partial"
    other.mkdir()
    with pytest.raises(hp.UserError, match="exists already"):
        check_target(tmp_path / "out", folder=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"out", "out/old", other.name}


def test_what_was_replaced_is_never_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> None:
        with replacing(tmp_path / "out") as new:
            new.mkdir()
            (new / name).touch()

    make("old")
    with monkeypatch.context() as patch:
        patch.setattr("hifiprune.io.atomic.shutil.rmtree", lambda *_, **__: None)  # as if killed before
        make("new")
    shutil.rmtree(tmp_path / "out")
    check_target(tmp_path / "out", folder=True)
    assert not any(tmp_path.iterdir())


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as first:
        first.write_text("first")
        with replacing(tmp_path / "out") as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "out").read_text() == "first"


def same_plan(ours: Path, theirs: Path) -> None:
    """Prunes keep the same neurons, by scores that are the same but for rounding."""
    folders = [ours / "hifiprune", theirs / "hifiprune"]
    plans = [Plan.load(folder / "plan.json") for folder in folders]
    assert all(torch.equal(one, other) for one, other in zip(plans[0].kept, plans[1].kept, strict=True))
    scores = [Scores.load(folder / "scores.safetensors") for folder in folders]
    assert scores[0].objective == pytest.approx(scores[1].objective, rel=1e-12)
    for one, other in zip(scores[0].values, scores[1].values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", ["hfprune", "self-distillation"])
def test_any_number_of_processes_gives_the_same_plan(world: Path, tmp_path: Path, criterion: str) -> None:
    text = ("--calibration", world / "calibration.txt", *TEXT, "--criterion", criterion, "--device", "cpu")
    words = ["prune", world / "dense", "--width", 24, "--allocation", "global", *text]
    alone = run(*words, "--output", tmp_path / "1")
    assert alone.code == 0, alone.err
    for processes in (2, 4):
        output = tmp_path / str(processes)
        shared = forked(tmp_path / f"told-{processes}", command(*words, "--output", output), processes)
        assert shared.codes == [0] * processes, shared.err
        assert f"shared out among {processes} processes" in shared.err
        assert shared.err.count("Scoring ") == 1, "one process speaks"
        same_plan(output, tmp_path / "1")
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "4", "told-2", "told-4"}


@pytest.mark.exhaustive  # two processes that import everything
def test_a_launcher_starts_processes_that_give_the_same_plan(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", *TEXT, "--device", "cpu")
    words = ["prune", world / "dense", "--width", 24, *text, "--output"]
    alone = run(*words, tmp_path / "alone")
    assert alone.code == 0, alone.err
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", "-m", "hifiprune"]
    started = [*map(str, [*launch, *words, tmp_path / "shared"])]
    shared = subprocess.run(started, capture_output=True, text=True, check=False, timeout=300)
    assert shared.returncode == 0, shared.stderr
    assert "shared out among 2 processes" in shared.stderr
    assert "terminate called" not in shared.stderr
    same_plan(tmp_path / "shared", tmp_path / "alone")


def test_processes_that_are_killed_go_on_to_the_same_plan(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", *TEXT, "--device", "cpu")
    words = ["prune", world / "dense", "--width", 24, *text, "--output"]
    assert forked(tmp_path / "first", command(*words, tmp_path / "quiet"), 2).codes == [0, 0]
    doomed = command(*words, tmp_path / "killed", before=lambda: dying_in_state(2))
    assert -signal.SIGKILL in forked(tmp_path / "second", doomed, 2).codes
    assert not (tmp_path / "killed").exists()
    again = forked(tmp_path / "third", command(*words, tmp_path / "killed", "--json"), 2)
    assert again.codes == [0, 0], again.err
    assert json.loads(again.out)["reused_parts"] == 1, "of the process that tells"
    for name in ("model.safetensors", "hifiprune/plan.json", "hifiprune/scores.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()


def test_what_cannot_be_shared_out_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(run("inspect", world / "dense"), "inspect runs in one process, and 4 were started; score, prune, recover")
    words = ("score", world / "dense", "--calibration", world / "calibration.txt", "--num-samples", 3, "--seq-len", 24)
    message = "3 batches of windows cannot be shared out among 4 processes: start fewer"
    refused(run(*words, "--output", tmp_path / "scores"), message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("code", [0, 2])
def test_processes_end_as_the_first_does_and_close_their_group(tmp_path: Path, code: int) -> None:
    def work() -> None:
        distributed.init_process_group("gloo")
        leave(ends := follow_first(code if rank() == 0 else 0))
        sys.stdout.write(f"process {rank()} ends with {ends}, group: {distributed.is_initialized()}\n")

    ended = forked(tmp_path / "told", work, 2)
    lines = sorted(line for line in ended.out.splitlines() if line.startswith("process "))
    assert lines == [f"process {number} ends with {code}, group: False" for number in range(2)], ended.err
    assert "terminate called" not in ended.err


def test_without_a_group_a_process_ends_by_itself() -> None:
    assert follow_first(2) == 2
    leave(2)
