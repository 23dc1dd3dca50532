"""What `push` refuses: what no engine can load, and what was never meant for others."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from hifiprune.io.manifest import MANIFEST
from tests.commands import refused, run

Change = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "small"
    words = ("--width", 24, "--round-to", 1, "--criterion", "magnitude")
    assert run("prune", world / "dense", "--output", folder, *words).code == 0
    return folder


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "small"))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """A change of the weights."""

    def rewrite(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS, {"format": "pt"})

    return rewrite


def facts(name: str, **changed: Any) -> Change:
    """A change of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def index(**places: str) -> Change:
    """An index in place of the one file."""

    def write(folder: Path) -> None:
        shards = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors") | places
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))

    return write


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (text(WEIGHTS, POINTER), "model.safetensors is a git-lfs pointer, not the file: run `git lfs pull`"),
        (text("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "truncated or damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"lacks {WEIGHTS}"),
        (tensors(lambda stored: stored.pop(GATE)), f"lacks 1 tensors, such as {GATE}"),
        (tensors(lambda stored: stored.update({GATE: torch.zeros(24, 7)})), f"{GATE} is [24, 7] in the files"),
        (tensors(lambda stored: stored.update(other=stored.pop(GATE))), f"lacks 1 tensors, such as {GATE}"),
        (facts("config.json", intermediate_size=25), "mlp.gate_proj.weight is [24, "),
        (text("config.json", "{"), "config.json is truncated or damaged"),
        (text("tokenizer.json", "{}"), "the tokenizer of"),
        (text("tokenizer_config.json", "{"), "tokenizer_config.json is truncated or damaged"),
        (text("generation_config.json", "[1]"), "generation_config.json must hold a JSON object, not [1]"),
        (index(x="../../../../etc/passwd"), "names ../../../../etc/passwd, outside of its folder"),
        (index(x="/etc/passwd"), "names /etc/passwd, outside of its folder"),
        (index(x="model-00002-of-00002.safetensors"), "lacks model-00002-of-00002.safetensors"),
        (lambda folder: (index()(folder), shutil.copy(folder / "model-00001-of-00001.safetensors", folder / WEIGHTS)),
         "holds weights twice"),
        (text("hifiprune/scores.safetensors", "x"), "scores.safetensors is truncated or damaged"),
        (text(".env", "TOKEN=x"), "holds what is never uploaded: .env (hidden)"),
        (text("hifiprune/.env", "TOKEN=x"), "hifiprune/.env (hidden)"),
        (lambda folder: (folder / "a").symlink_to("/etc/passwd"), "a (a link out of the folder)"),
        (lambda folder: (folder / "a").symlink_to("/etc"), "a (a link out of the folder)"),
        (lambda folder: (folder / "a").symlink_to(".hifiprune.json"), "a (hidden)"),
        (lambda folder: (folder / "a").symlink_to("b"), "a (no file)"),
    ],
)  # fmt: skip
def test_what_is_not_pushed(small: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "create_repo", None)
    change(small)
    for more in ((), ("--upload",)):
        refused(run("push", small, "me/x", *more), message)


@pytest.mark.parametrize("change", [None, index(), lambda folder: (folder / "b").symlink_to("README.md")])
def test_what_is_listed_is_what_is_uploaded(
    small: Path, change: Change | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change:
        change(small)
    (small / "notes [1].md").write_text("x")
    (small / "notes 1.md").write_text("x")
    shown = run("push", small, "me/x", "--json")
    assert shown.code == 0, shown.err
    listed = {*shown.json["files"]}
    assert listed == {str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()} - {MANIFEST}
    (small / "added later").write_text("x")
    folders: list[dict[str, Any]] = []
    files: list[str] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **how: folders.append(how))
    monkeypatch.setattr(HfApi, "upload_file", lambda _, path_in_repo, **__: files.append(path_in_repo))
    (small / "added later").unlink()
    assert run("push", small, "me/x", "--upload").code == 0
    (small / "added later").write_text("x")
    names = [str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()]
    allowed = [name for name in names if any(fnmatch(name, each) for each in folders[0]["allow_patterns"])]
    taken = {name for name in allowed if name not in folders[0]["ignore_patterns"]}
    assert taken | {*files} == listed
    table = run("push", small, "me/x")
    assert "0.0 MB" not in table.out
    assert f"{(small / 'config.json').stat().st_size / 1000:.1f} kB" in table.out or "bytes" in table.out


def test_the_index_of_no_command_leaves_its_folder(small: Path, tmp_path: Path) -> None:
    index(x="../outside.safetensors")(small)
    shutil.copy(small / "model-00001-of-00001.safetensors", tmp_path / "outside.safetensors")
    words = ("--width", 16, "--round-to", 1, "--criterion", "magnitude")
    refused(run("prune", small, "--output", tmp_path / "out", *words), "outside of its folder")
