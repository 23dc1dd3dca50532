"""Outputs: where they may be, what they may replace, and that one run at a time makes one."""

import ast
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import hifiprune as hp
from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import disk_size, local_path, replacing, update_manifest
from hifiprune.io.manifest import MANIFEST, fingerprint, sampled_fingerprint
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
from tests.commands import Interruption, Result, leftovers, refused, run
from tests.conftest import save_checkpoint
from tests.processes import command, start

CUT = ("--width", 24, "--round-to", 1, "--criterion", "magnitude")
TEXT = ("--num-samples", 2, "--seq-len", 16)


def wait_while_reading() -> None:
    """Have this process say that it reads its text, and never end."""

    def wait(*_: Any) -> None:
        sys.stdout.write("reading\n")
        time.sleep(99)

    pytest.MonkeyPatch().setattr("hifiprune.commands.steps.read_texts", wait)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and a working directory in it."""
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    return tmp_path / "home"


@pytest.fixture
def dense(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "dense", tmp_path / "dense"))


def prune(model: Path, output: object, *more: object) -> Result:
    return run("prune", model, "--output", output, *CUT, *more)


def score(model: Path, output: object, *more: object) -> Result:
    return run("score", model, "--output", output, "--criterion", "magnitude", *more)


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_outputs_never_lie_inside_a_model(dense: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    before = contents(dense)
    (tmp_path / "link").symlink_to(dense)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link").symlink_to(dense / "tokenizer.json")
    for name in ("model.safetensors", "config.json", "new", "sub/new", "../dense/new", "../deep/../link/new"):
        refused(score(dense, dense / name, *more), "lies inside the input")
    refused(prune(dense, dense / "pruned", *more), "lies inside the input")
    refused(prune(dense, tmp_path / "link" / "pruned", *more), "lies inside the input")
    refused(score(tmp_path / "link", dense / "model.safetensors", *more), "lies inside the input")
    refused(prune(dense, tmp_path / "link", *more), "is the input")
    refused(score(dense, tmp_path / "deep" / "link", *more), "lies inside the input")
    refused(prune(tmp_path / "link", tmp_path / "deep" / "..", *more), "contains")
    assert contents(dense) == before
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "link", "deep"}


def test_outputs_never_are_where_links_of_a_model_lead(world: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(world / "dense", blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    refused(score(snapshot, blobs / "model.safetensors", "--overwrite"), "is the input")
    refused(prune(snapshot, blobs, "--overwrite"), "contains the input")
    assert contents(blobs) == contents(world / "dense")
    assert score(snapshot, blobs / "scores").code == 0, "a file beside that is nobody's"


def test_names_that_differ_and_files_that_do_not(dense: Path, tmp_path: Path) -> None:
    assert score(dense, tmp_path / "scores").code == 0
    os.link(tmp_path / "scores", tmp_path / "other")
    words = ("prune", dense, "--width", 24, "--scores", tmp_path / "scores", "--output")
    refused(run("ablate", *words[1:2], *words[4:], tmp_path / "other", "--overwrite"), "is the input")
    for name in ("scores", "other"):
        refused(run(*words, tmp_path / name, "--overwrite"), "is the input")
    assert (tmp_path / "other").read_bytes() == (tmp_path / "scores").read_bytes()


def test_the_dense_model_that_a_record_names_is_an_input(dense: Path, tmp_path: Path) -> None:
    assert prune(dense, tmp_path / "small").code == 0
    refused(prune(tmp_path / "small", dense / "smaller"), "lies inside the input")
    measured = ("--text", "python-docs", "--seq-len", 16, "--output", dense / "e")
    refused(run("evaluate", tmp_path / "small", *measured), "lies inside")
    shutil.copytree(tmp_path / "small", tmp_path / "other")
    timed = ("--lengths", 8, "--new-tokens", 4, "--output", dense / "e")
    refused(run("bench", tmp_path / "small", tmp_path / "other", *timed), "lies inside")
    refused(run("export", tmp_path / "small", "--output", dense / "e.gguf"), "lies inside")
    plan = hp.Plan.load(tmp_path / "small" / "hifiprune" / "plan.json")
    with pytest.raises(UserError, match="lies inside the input"):
        cut_checkpoint(str(dense), dense / "cut", plan)
    with pytest.raises(UserError, match="is the input"):
        cut_checkpoint(str(dense), dense, plan, overwrite=True)


def test_texts_tasks_and_reported_folders_are_inputs(dense: Path, world: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(world / "calibration.txt", texts / "a.txt")
    words = ("--criterion", "entropy", *TEXT, "--calibration", texts)
    refused(run("score", dense, "--output", texts / "scores", *words), "lies inside the input")
    refused(run("evaluate", dense, "--text", texts, "--seq-len", 16, "--output", texts / "e"), "lies inside the input")
    rows = ("--data", texts, "--teacher", dense, "--seq-len", 16)
    refused(run("recover", dense, *rows, "--output", texts / "better"), "lies inside the input")
    refused(run("recover", dense, *rows, "--output", dense / "better"), "lies inside the input")
    assert prune(dense, tmp_path / "small").code == 0
    refused(run("report", tmp_path / "small", "--output", tmp_path / "small" / "r.html"), "lies inside")
    refused(
        run("report", tmp_path / "small", "--output", tmp_path / "small" / "run.json", "--overwrite"), "lies inside"
    )
    assert run("score", dense, "--output", tmp_path / "texts.scores", *words).code == 0, "beside it is fine"


def test_outputs_never_lie_in_another_output(dense: Path, tmp_path: Path) -> None:
    assert prune(dense, tmp_path / "small").code == 0
    before = contents(tmp_path / "small")
    refused(score(dense, tmp_path / "small" / "run.json", "--overwrite"), "which is an output itself")
    refused(prune(dense, tmp_path / "small" / "sub"), "which is an output itself")
    assert contents(tmp_path / "small") == before


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../work", "~", "~/", "$HOME", "${HOME}/work", "../../home"])
def test_places_that_are_no_outputs(dense: Path, home: Path, name: str) -> None:
    (home / "work" / "mine").write_text("x")
    result = prune(dense, name, "--overwrite")
    refused(result, "the working directory" if name.strip() else "an empty name was given")
    assert (home / "work" / "mine").read_text() == "x"
    (home / "work" / "mine").unlink()
    assert prune(dense, name, "--overwrite").code == 2, "empty or not"
    assert (home / "work").is_dir()


def test_a_home_is_no_output_wherever_one_works(dense: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dense.parent)
    for name in ("~", "$HOME", home):
        refused(prune(dense, name, "--overwrite"), "is your home")
    monkeypatch.setenv("HOME", str(home / "work" / "me"))
    refused(prune(dense, home / "work", "--overwrite"), "contains your home")


def test_repositories_mounts_and_the_hubs_cache_are_no_outputs(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code" / ".git").mkdir(parents=True)
    refused(prune(dense, tmp_path / "code", "--overwrite"), "is a repository")
    refused(score(dense, tmp_path / "code" / ".git" / "config"), "is a repository")
    refused(prune(dense, "/", "--overwrite"), "contains")
    refused(prune(dense, "/proc", "--overwrite"), "is where a disk is mounted")
    refused(prune(dense, "/home/somebody", "--overwrite"), "is a home")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "sets"))
    refused(prune(dense, tmp_path / "sets" / "small"), "lies inside the hub's cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(prune(dense, tmp_path / "hub" / "small"), "lies inside the hub's cache")
    (tmp_path / "hub").mkdir()
    refused(prune(dense, tmp_path / "hub", "--overwrite"), "is the hub's cache")
    assert prune(dense, tmp_path / "hub2").code == 0


def test_homes_and_variables_are_filled_in_everywhere(dense: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(dense.parent))
    monkeypatch.delenv("NOWHERE", raising=False)
    scored = run("score", "$MODELS/dense", "--output", "~/s.safetensors", "--criterion", "magnitude")
    assert scored.code == 0, scored.err
    assert str(home / "s.safetensors") in scored.out, "what can be pasted"
    result = run("prune", "~/../dense", "--output", "${MODELS}/small", "--scores", "~/s.safetensors", "--width", 24)
    assert result.code == 0, result.err
    assert (dense.parent / "small" / "config.json").is_file()
    for name in ("~/small", Path("~/small2")):
        hp.prune("$MODELS/dense", name, hp.PruneConfig(hp.Budget(width=24), criterion="magnitude"))
    scores = hp.Scores.load("~/s.safetensors")
    scores.save("~/again")
    hp.Plan.load("$MODELS/small/hifiprune/plan.json").save("~/plan.json")
    assert {path.name for path in home.iterdir()} == {"work", "s.safetensors", "small", "small2", "again", "plan.json"}
    assert not any((home / "work").iterdir())
    for name in ("~nobody-of-this-name/x", "$NOWHERE/x", "${NOWHERE}x/y", "~nobody-of-this-name", "small-$NOWHERE"):
        refused(prune(dense, name), "is not known")
    (dense.parent / "a$b").mkdir()
    assert prune(dense, dense.parent / "a$b" / "small").code == 0, "a folder that has such a name"


def test_only_what_hifiprune_wrote_is_replaced(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    output.mkdir()
    assert prune(dense, output, "--overwrite").code == 0, "an empty folder"
    assert prune(dense, output, "--overwrite").code == 0, "its own"
    for name in ("thesis.tex", "hifiprune/.env", "deep/er/notes"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("precious")
        refused(prune(dense, output, "--overwrite"), f"holds {name}, which hifiprune did not write")
        (output / name).unlink()
    (output / "link").symlink_to(dense)
    refused(prune(dense, output, "--overwrite"), "holds link, which hifiprune did not write")
    (output / "link").unlink()
    assert prune(dense, output, "--overwrite").code == 0
    shutil.copytree(output, tmp_path / "copy")
    assert prune(dense, tmp_path / "copy", "--overwrite").code == 0, "a copy of its own"
    card = (output / "README.md").read_text()
    (output / "README.md").write_text(card + "my notes")
    refused(prune(dense, output, "--overwrite"), "holds README.md, which was changed since hifiprune wrote it")
    (output / "README.md").write_text(card)
    (output / MANIFEST).unlink()
    refused(prune(dense, output, "--overwrite"), f"and {len(contents(output)) - 3} more, which hifiprune did not")
    shutil.rmtree(output)
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    refused(prune(dense, output, "--overwrite"), "holds thesis.tex, which hifiprune did not write")
    assert contents(output) == {"thesis.tex": b"precious"}


def test_weights_that_were_trained_further_are_not_replaced(dense: Path, tmp_path: Path) -> None:
    assert prune(dense, tmp_path / "small").code == 0
    path = tmp_path / "small" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000:] = bytes(5000)
    path.write_bytes(data)
    refused(prune(dense, tmp_path / "small", "--overwrite"), "holds model.safetensors, which was changed since")


def test_fingerprints_see_changes_everywhere(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 10_000_000
    path.write_bytes(bytes(size))
    before = fingerprint(path)
    for part in range(10):  # of which each is larger than the distance of two blocks
        path.write_bytes(bytes(part * size // 10) + b"\1" * (size // 10) + bytes(size - (part + 1) * size // 10))
        assert fingerprint(path) != before
    path.write_bytes(bytes(200_000))
    before = fingerprint(path)
    for place in range(0, 200_000, 20_011):  # few bytes are all seen
        path.write_bytes(bytes(place) + b"\1" + bytes(199_999 - place))
        assert fingerprint(path) != before


def test_results_that_go_into_a_card_leave_it_hifiprunes(dense: Path, world: Path, tmp_path: Path) -> None:
    assert prune(dense, tmp_path / "small").code == 0
    words = ("evaluate", tmp_path / "small", "--text", world / "held.txt", "--seq-len", 32, "--card")
    assert run(*words).code == 0
    assert prune(dense, tmp_path / "small", "--overwrite").code == 0
    with (tmp_path / "small" / "README.md").open("a") as card:
        card.write("my notes")
    assert run(*words).code == 0
    refused(prune(dense, tmp_path / "small", "--overwrite"), "holds README.md, which was changed")


@pytest.mark.parametrize(
    "content",
    [b"", b"precious", b"{}", b'{"format": "mine"}', b"<html></html>", b"GGUF", b"\0" * 99, b"[1]", b"{" * 99],
)
def test_files_of_others_are_not_replaced(dense: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    refused(score(dense, path, "--overwrite"), "was not written by hifiprune")
    with pytest.raises(RunError, match="was not written by hifiprune"):
        hp.RunRecord("x", {}).save(path)
    assert path.read_bytes() == content


def test_weights_are_not_replaced_by_scores(dense: Path, world: Path, tmp_path: Path) -> None:
    shutil.copy(dense / "model.safetensors", tmp_path / "mine.safetensors")
    refused(score(dense, tmp_path / "mine.safetensors", "--overwrite"), "was not written by hifiprune")
    assert score(dense, tmp_path / "scores").code == 0
    assert score(dense, tmp_path / "scores", "--overwrite").code == 0
    assert prune(dense, tmp_path / "small").code == 0
    for more in ((), ("--overwrite",)):
        assert run("report", tmp_path / "small", "--output", tmp_path / "r.html", *more).code == 0
    os.mkfifo(tmp_path / "pipe")
    refused(score(dense, tmp_path / "pipe", "--overwrite"), "is not a file")
    refused(score(dense, "/dev/full", "--overwrite"), "is not a file")


def test_one_run_at_a_time_makes_an_output(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("--calibration", "python-docs", *TEXT)
    words = ("prune", dense, "--output", tmp_path / "new" / "small", "--width", 24, *texts)
    (first,) = start(tmp_path, command(*words, before=wait_while_reading))
    while not (tmp_path / "1").exists() or "reading" not in (tmp_path / "1").read_text():
        assert first.is_alive(), (tmp_path / "2").read_text()
        time.sleep(0.02)
    for more in ((), ("--overwrite",)):
        refused(prune(dense, tmp_path / "new" / "small", *more), "is being made by another run")
    refused(score(dense, tmp_path / "new" / "small"), "is being made by another run")
    assert score(dense, tmp_path / "new" / "scores").code == 0, "another name in its folder"
    first.kill()
    first.join()
    assert prune(dense, tmp_path / "new" / "small").code == 0, "of those that are gone none is waited for"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"small", "scores"}


def test_runs_in_one_process_keep_out_of_each_others_way(dense: Path, tmp_path: Path) -> None:
    @exclusive
    def make(inside: Callable[[], Any]) -> None:
        check_target(tmp_path / "a" / "b" / "out", folder=True)
        inside()

    def fail() -> None:
        raise KeyboardInterrupt

    outcome: list[Any] = []

    def other() -> None:
        try:
            make(lambda: None)
        except UserError as error:
            outcome.append(str(error))

    def meanwhile() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    make(meanwhile)
    assert "is being made by another run" in outcome[0]
    with pytest.raises(KeyboardInterrupt):
        make(fail)
    make(lambda: None)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}, "neither locks nor folders are left"


@pytest.mark.parametrize(("overwrite", "why"), [(False, "exists already"), (True, "holds thesis, which")])
def test_what_came_meanwhile_is_not_replaced(tmp_path: Path, overwrite: bool, why: str) -> None:
    def write() -> None:
        with replacing(tmp_path / "out", overwrite=overwrite) as new:
            new.mkdir()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis").write_text("precious")

    with pytest.raises(RunError, match=why):
        write()
    assert contents(tmp_path / "out") == {"thesis": b"precious"}
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("command", ["score", "prune", "cut"])
def test_what_came_while_a_command_worked_is_not_replaced(
    command: str, ours: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = tempfile.mkdtemp
    out, small = tmp_path / "out", tmp_path / "small"
    assert prune(dense, small).code == 0

    def meanwhile(*words: Any, prefix: str = "", **how: Any) -> Any:
        if prefix == ".out." and ours:
            shutil.copytree(small, out)
        elif prefix == ".out.":
            out.write_text("precious")
        return made(*words, prefix=prefix, **how)

    monkeypatch.setattr(tempfile, "mkdtemp", meanwhile)
    if command == "cut":
        with pytest.raises(RunError, match="came there while this run worked"):
            cut_checkpoint(str(dense), out, hp.Plan.load(small / "hifiprune" / "plan.json"))
    else:
        refused((score if command == "score" else prune)(dense, out), "came there while this run worked", code=1)
    assert contents(out) == contents(small) if ours else out.read_text() == "precious"
    assert not leftovers(tmp_path)


def test_whoever_makes_an_output_tells_whether_to_overwrite() -> None:
    """So `replacing` looks again in the end; where it is not told, or told a constant, it writes a file of our own."""
    makers: dict[str, set[str]] = {}
    for path in Path(hp.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "replacing":
                makers.setdefault(path.stem, set()).add(" ".join(ast.unparse(word) for word in call.keywords))
    own = {"atomic", "resume", "callback", "model_card", "demo"}
    constant = {"plan", "run_record"}
    assert {name for name, told in makers.items() if "" in told} == own
    assert {name for name, told in makers.items() if "overwrite=True" in told} == constant
    rest = set().union(*(told for name, told in makers.items() if name not in own | constant))
    assert rest <= {"overwrite=overwrite", "overwrite=config.overwrite", "overwrite=job.config.overwrite"}


def test_unfinished_work_of_another_run_is_no_output(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "q.prune-unfinished").mkdir()
    for name in ("q.prune-unfinished", "q.prune-unfinished/x"):
        refused(prune(dense, tmp_path / name, "--overwrite"), "where an interrupted run goes on")


def test_an_interruption_says_what_stays(
    dense: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        (tmp_path / "scores.score-unfinished").mkdir(exist_ok=True)
        os.kill(os.getpid(), 2)

    monkeypatch.setattr("hifiprune.commands.steps.score_all", stopped)
    words = ("--criterion", "entropy", "--calibration", world / "calibration.txt", *TEXT)
    stays = f"{tmp_path / 'scores.score-unfinished'} stays, and the same command goes on from there"
    refused(run("score", dense, "--output", tmp_path / "scores", *words), stays, code=1)
    result = run("score", dense, "--output", tmp_path / "others", *words)
    refused(result, "interrupted by SIGINT: no half-written output is left; give the same command again", code=1)
    assert "stays" not in result.err, "nothing is finished that could"


def test_names_that_are_too_long(dense: Path, tmp_path: Path) -> None:
    refused(prune(dense, tmp_path / ("x" * 300)), "names have at most 255 bytes")
    refused(prune(dense, tmp_path / ("x" * 240)), "has 240 bytes, and 215 are possible here")
    refused(prune(dense, tmp_path / "/".join(["x" * 200] * 30)), "paths 4000")
    refused(prune(Path("y" * 300), tmp_path / "out"), "names have at most 255 bytes")
    assert score(dense, tmp_path / ("x" * 215)).code == 0
    refused(prune(dense, dense / "config.json" / "x"), "lies inside")
    (tmp_path / "loop").symlink_to("loop")
    refused(prune(dense, tmp_path / "loop" / "x"), "cannot be written")
    refused(prune(dense, tmp_path / "loop"), "exists already")
    with pytest.raises(UserError, match="zero byte"):
        local_path("a\0b")


def test_folders_that_cannot_be_written(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(prune(dense, tmp_path / "out"), "is not a writable folder")
    monkeypatch.undo()
    refused(score(dense, "/proc/out"), "cannot be written", code=2)


def test_sizes_are_in_units_that_leave_digits() -> None:
    sizes = [0, 1, 999, 1000, 6_540, 65_536, 2_500_000, 7_260_000_000, 10**12]
    shown = ["0 bytes", "1 byte", "999 bytes", "1.0 kB", "6.5 kB", "65.5 kB", "2.50 MB", "7.26 GB", "1,000.00 GB"]
    assert [disk_size(size) for size in sizes] == shown


def test_the_mark_lists_the_files(dense: Path, tmp_path: Path) -> None:
    assert prune(dense, tmp_path / "small").code == 0
    listed = json.loads((tmp_path / "small" / MANIFEST).read_text())["files"]
    assert {*listed} | {MANIFEST} == {*contents(tmp_path / "small")}
    assert run("inspect", tmp_path / "small").code == 0
    assert prune(tmp_path / "small", tmp_path / "smaller", "--width", 16).code == 0


def test_finished_demos_are_shown_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Path(__file__).parent.parent / "benchmarks" / "results" / "demo.json"
    summary = json.loads(recorded.read_text())
    settings = summary["arguments"]
    demo = ("demo", "--output", tmp_path / "demo")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".hifiprune-demo").touch()
    shutil.copy(recorded, tmp_path / "demo")
    monkeypatch.setattr("hifiprune.commands.demo.fetch_smollm2", None)
    monkeypatch.setattr("hifiprune.commands.demo.write_texts", None)
    shown = run(*demo, "--num-samples", settings["num_samples"], "--seq-len", settings["seq_len"])
    assert shown.code == 0, shown.err
    assert "is finished, and this is what it showed; --overwrite makes it anew" in shown.err.replace("\n", " ")
    assert f"{summary['results']['parameters']['after']:,}" in shown.out
    refused(run(*demo, "--num-samples", 3), "holds a demo of other settings")
    assert run(*demo, "--overwrite").code == 1, "it begins"
    assert not (tmp_path / "demo" / "demo.json").exists(), "and goes on where it stops"
    (tmp_path / "thesis").write_text("precious")
    refused(run("demo", "--output", tmp_path, "--overwrite"), "was not made by a demo")


def test_a_model_in_the_working_directory(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dense)
    refused(score(Path("."), "scores"), "lies inside the input")
    assert score(Path("."), "../scores").code == 0
    monkeypatch.chdir(dense.parent)
    assert prune(Path("dense"), "small").code == 0
    assert save_checkpoint(dense.parent / "other").is_dir()


def test_one_byte_of_a_file_that_people_edit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bytes(5_000_000))
    before, sampled = fingerprint(path), sampled_fingerprint(path)
    for place in (4_097, 77_777, 2_500_000 - 5_000):  # between the blocks that are sampled
        path.write_bytes(bytes(place) + b"\1" + bytes(4_999_999 - place))
        assert sampled_fingerprint(path) == sampled
        assert fingerprint(path) != before
    monkeypatch.setattr("hifiprune.io.manifest.WHOLE", 4_999_999)
    assert fingerprint(path) == sampled


def test_lists_of_samples_are_read_as_before(dense: Path, tmp_path: Path) -> None:
    """Version 0.1 sampled every file, and what it wrote can be replaced still."""
    assert prune(dense, tmp_path / "small").code == 0
    path = tmp_path / "small" / MANIFEST
    facts = json.loads(path.read_text())
    facts["files"] = {name: sampled_fingerprint(tmp_path / "small" / name) for name in facts["files"]}
    path.write_text(json.dumps(facts))
    assert prune(dense, tmp_path / "small", "--overwrite").code == 0
    assert json.loads(path.read_text())["files"] != facts["files"]
    path.write_text(json.dumps(facts | {"files": dict.fromkeys(facts["files"], "0" * 64)}))
    refused(prune(dense, tmp_path / "small", "--overwrite"), "which was changed since hifiprune wrote it")


def test_the_list_is_whole_at_every_moment(
    dense: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it is written anew, the old one is there."""
    assert prune(dense, tmp_path / "small").code == 0
    path = tmp_path / "small" / MANIFEST
    before, write = path.read_text(), Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        if MANIFEST not in self.name:
            return write(self, text, **options)
        write(self, text[: len(text) // 2], **options)
        raise Interruption

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(Interruption):
        update_manifest(tmp_path / "small", "README.md")
    assert path.read_text() == before
    assert not leftovers(tmp_path / "small")
