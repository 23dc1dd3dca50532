"""Models of the hub: revisions, what records keep of them, and access tokens that nothing tells.

The hub's own library reads a cache as it leaves one, offline, or asks a server of this process.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from hifiprune.io.hub import at_revision, is_on_hub
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import dense_of, record_of
from tests.commands import Interruption, refused, run
from tests.conftest import save_checkpoint
from tests.test_resuming import stopping_after

MAIN, OLD = "a" * 40, "b" * 40
"""Commits of the model `org/model`: of its branch `main`, and of its tag `v1`."""
SECRET = "hf_very-Secret"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of `org/model`, with two commits whose weights differ, and no hub to ask."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # for processes that are started
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "cache" / "models--org--model"
    (folder / "refs").mkdir(parents=True)
    for name, commit, epsilon in (("main", MAIN, 0.05), ("v1", OLD, 0.02)):
        (folder / "refs" / name).write_text(commit)
        save_checkpoint(folder / "snapshots" / commit, initializer_range=epsilon)
    return folder


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is afterwards what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cut(world: Path, output: Path, *words: object) -> dict[str, Any]:
    """Prune, and return the record."""
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 16, "--width", 24)
    result = run("prune", *words, "--output", output, *text, "--round-to", 8)
    assert result.code == 0, result.err
    facts: dict[str, Any] = json.loads((output / "run.json").read_text())
    return facts


def test_a_revision_is_read_by_flag_and_by_name(hub: Path, world: Path, tmp_path: Path) -> None:
    folder = cut(world, tmp_path / "0", hub / "snapshots" / OLD)
    flag, name = cut(world, tmp_path / "1", "org/model", "--revision", "v1"), cut(world, tmp_path / "2", "org/model@v1")
    latest = cut(world, tmp_path / "3", "org/model")
    assert flag["results"]["model_hash"] == name["results"]["model_hash"] == folder["results"]["model_hash"]
    assert latest["results"]["model_hash"] != flag["results"]["model_hash"]
    assert flag["arguments"]["model"] == name["arguments"]["model"] == "org/model@v1"
    assert flag["commits"] == name["commits"] == {"org/model@v1": OLD}
    assert latest["commits"] == {"org/model": MAIN}
    assert folder["commits"] == {}
    for made in "123":
        assert "\nbase_model: org/model\n" in (tmp_path / made / "README.md").read_text()
    made_by = record_of(find_checkpoint(str(tmp_path / "1")))
    assert dense_of(made_by) == f"org/model@{OLD}"


def test_a_run_is_repeated_at_the_commit_that_it_had(hub: Path, world: Path, tmp_path: Path) -> None:
    before = cut(world, tmp_path / "old", "org/model", "--revision", "v1")
    (hub / "refs" / "v1").write_text(MAIN)  # the tag is moved
    again = run("prune", "--config", tmp_path / "old" / "run.json", "--output", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    assert again.json["arguments"]["model"] == f"org/model@{OLD}"
    assert again.json["results"]["model_hash"] == before["results"]["model_hash"]
    moved = run(
        "prune",
        "--config",
        tmp_path / "old" / "run.json",
        "--revision",
        "main",
        "--output",
        tmp_path / "main",
        "--json",
    )
    assert moved.json["commits"] == {"org/model@main": MAIN}
    words = ("--data", world / "calibration.txt", "--max-steps", 1, "--seq-len", 24, "--lora-r", 4)
    shutil.rmtree(hub / "snapshots" / MAIN)
    result = run("recover", tmp_path / "old", "--output", tmp_path / "better", *words, "--json")
    assert result.code == 0, result.err
    assert result.json["commits"] == {f"org/model@{OLD}": OLD}, "the dense model is read at the commit that was pruned"


def test_revisions_are_of_models_on_the_hub(hub: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "dense", tmp_path / "my@model")
    for model in (world / "dense", tmp_path / "my@model"):
        refused(run("inspect", model, "--revision", "v1"), f"{model} is on this disk, and revision 'v1' is for models")
    assert run("inspect", tmp_path / "my@model").code == 0
    refused(run("inspect", "org/model", "--revision", "v2"), "could not be reached to look for org/model@v2 there")
    refused(run("inspect", "org/model", "--revision", "../../x"), "there is no model folder or .gguf file")
    refused(run("evaluate", "org/model", "--revision", "v1"), "there is no option --revision")


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("a/b", None, "a/b"), ("a/b", "v1", "a/b@v1"), ("a/b@main", "v1", "a/b@v1"), ("a/b@main", None, "a/b@main"),
        ("gpt2", "refs/pr/1", "gpt2@refs/pr/1"),
    ],
)  # fmt: skip
def test_names_at_revisions(name: str, revision: str | None, expected: str) -> None:
    assert at_revision(name, revision) == expected
    assert is_on_hub(expected)


def test_several_revisions_are_measured_side_by_side(hub: Path, world: Path, tmp_path: Path) -> None:
    words = ("--text", world / "held.txt", "--seq-len", 16, "--against", "org/model", "--output", tmp_path / "out")
    result = run("evaluate", "org/model@v1", *words, "--json")
    assert result.code == 0, result.err
    assert result.json["commits"] == {"org/model@v1": OLD, "org/model": MAIN}
    assert result.json["results"]["models"]["org/model@v1"]["metrics"]["kl"]["value"] > 0
    (hub / "refs" / "v1").write_text(MAIN)
    again = run("evaluate", "--config", tmp_path / "out" / "run.json", "--json")
    metrics = [measured.json["results"]["models"] for measured in (result, again)]
    assert metrics[0]["org/model@v1"]["metrics"] == metrics[1][f"org/model@{OLD}"]["metrics"]


def test_nothing_of_another_revision_is_resumed_from(
    hub: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.SECONDS_BETWEEN", 0.0)  # states are kept after every batch
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.COST", float("inf"))
    words = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 16, "--json")
    with stopping_after(3), pytest.raises(Interruption):
        run("score", "org/model@v1", "--output", tmp_path / "s", *words)
    assert any(tmp_path.glob("s.score*/*/*")), "something was kept"
    other = run("score", "org/model", "--output", tmp_path / "s", *words)
    assert other.code == 0, other.err
    assert other.json["reused_parts"] == 0
    with stopping_after(3), pytest.raises(Interruption):
        run("score", "org/model@v1", "--output", tmp_path / "t", *words)
    same = run("score", "org/model", "--revision", "v1", "--output", tmp_path / "t", *words)
    assert same.json["reused_parts"] == 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """The tokens that were sent to a hub that gives nothing."""
    tokens: list[str | None] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "org/private" in self.path:  # not what the hub's library asks for itself
                tokens.append(self.headers["Authorization"])
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Error-Message", "Repository not found")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_other")  # and what the flag puts there does not outlast the test
    yield tokens
    server.shutdown()


@pytest.mark.parametrize("words", [("--token", SECRET), (f"--token={SECRET}",)])
def test_a_token_is_sent_and_told_nowhere(asked: list[str | None], words: tuple[str, ...]) -> None:
    result = run("inspect", "org/private", *words)
    refused(result, "the hub answered: Repository not found; a private or gated model needs --token, HF_TOKEN or")
    assert {*asked} == {f"Bearer {SECRET}"}
    assert SECRET not in result.out + result.err


def test_without_a_token_the_environments_is_sent(asked: list[str | None]) -> None:
    refused(run("inspect", "org/private"), "Repository not found")
    assert {*asked} == {"Bearer hf_other"}


@pytest.mark.parametrize("token", ["", "hf_a b", "hf_a\n", "hf_é"])
def test_a_token_that_is_none(asked: list[str | None], token: str) -> None:
    result = run("inspect", "org/private", "--token", token)
    refused(result, "--token is empty, or has spaces or letters that no access token has; copy it again")
    assert "hf_a" not in result.err
    assert not asked


def test_a_token_that_would_not_be_sent(asked: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    refused(run("inspect", "org/private", "--token", SECRET), "HF_HUB_DISABLE_IMPLICIT_TOKEN is set: unset it")
    assert not asked


def test_no_file_holds_a_token(hub: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 16, "--width", 24)
    words = ("prune", "org/model", "--token", SECRET, "--round-to", 8, "--output", tmp_path / "out", *text)
    for more in (("--dry-run",), ("--verbose",)):
        result = run(*words, *more)
        assert result.code == 0, result.err
        assert os.environ["HF_TOKEN"] == SECRET
        assert "Next: hifiprune" in result.out
        assert SECRET not in result.out + result.err
    assert SECRET not in " ".join(sys.argv)
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    options = tmp_path / "options.yaml"
    options.write_text(f"token: {SECRET}")
    result = run(*words[:2], "--config", options, "--output", tmp_path / "two", *text)
    refused(result, "'token' is not an option")
    assert SECRET not in result.err


@pytest.mark.usefixtures("threads")
def test_threads_are_those_asked_for(world: Path, tmp_path: Path) -> None:
    other = 3 - torch.get_num_threads() % 2  # 2 or 3
    record = cut(world, tmp_path / "out", world / "dense", "--threads", other)
    assert torch.get_num_threads() == other
    assert record["environment"]["threads"] == other
    refused(run("inspect", world / "dense", "--threads", 2), "there is no option --threads")
    refused(run("score", world / "dense", "--output", tmp_path / "s", "--threads", 0), "threads 0 must be at least 1")


@pytest.mark.exhaustive  # which starts processes
@pytest.mark.usefixtures("threads")
def test_threads_are_those_asked_for_in_the_processes_that_are_timed(world: Path, tmp_path: Path) -> None:
    other = 3 - torch.get_num_threads() % 2  # 2 or 3
    torch.set_num_threads(1)
    cut(world, tmp_path / "out", world / "dense")
    options = tmp_path / "options.yaml"
    options.write_text(f"threads: {other}")
    words = ("--lengths", 4, "--new-tokens", 2, "--rounds", 1, "--repeats", 1, "--config", options, "--json")
    result = run("bench", world / "dense", tmp_path / "out", *words)
    assert result.code == 0, result.err
    assert result.json["results"]["threads"] == other
    options.write_text("threads: many")
    refused(
        run("bench", world / "dense", "x", "--config", options), "--config: threads: Input should be a valid integer"
    )


def test_files_are_fetched_at_the_commit_that_was_found(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = find_checkpoint("org/model@v1")
    assert (checkpoint.commit, checkpoint.exact_name) == (OLD, f"org/model@{OLD}")
    (hub / "refs" / "v1").write_text(MAIN)
    (checkpoint.folder / "model.safetensors").rename(checkpoint.folder / "elsewhere")
    asked = []

    def download(name: str, *, revision: str, **_: object) -> str:
        asked.append((name, revision))
        (checkpoint.folder / "elsewhere").rename(checkpoint.folder / "model.safetensors")
        return str(checkpoint.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint.fetch()
    assert asked == [("org/model", OLD)]
