"""No code of a checkpoint runs, whatever its files say, and nothing asks on standard input."""

import ast
import io
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.commands import refused, run
from tests.processes import run_module

ROOT = Path(__file__).parent.parent
LOADERS = {"from_pretrained", "from_config", "load_dataset", "HFLM", "pipeline"}
"""Calls of libraries that may load code of a checkpoint or data set, and have an option for it."""
MALICE = """
from pathlib import Path
Path({mark!r}).write_text("code of the checkpoint ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Tokenizer(PreTrainedTokenizerFast): pass
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
"""


def loading_calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a loader in the sources, with where it stands."""
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
                if name in LOADERS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {name}", node


def test_every_loading_call_refuses_code() -> None:
    calls = dict(loading_calls())
    assert len(calls) >= 9, "the loaders are not found any more"
    trusting = [
        where
        for where, call in calls.items()
        if not where.startswith("benchmarks/readers.py")  # reads only what it has just written
        and not any(
            word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
            for word in call.keywords
        )
    ]
    assert trusting == []


def test_every_package_that_is_imported_is_declared() -> None:
    imports = {
        name.partition(".")[0]
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    declared = {re.split(r"[^\w-]", each)[0].replace("_", "-").lower() for each in stated}
    packages = packages_distributions()
    foreign = imports - sys.stdlib_module_names - {"hifiprune", "llama_cpp"}
    assert [
        name for name in sorted(foreign) if not declared & {each.replace("_", "-").lower() for each in packages[name]}
    ] == []


@pytest.fixture
def question(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard input that answers every question by yes."""
    answers = io.StringIO("y\n" * 100)
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the code of the malicious checkpoints writes; what was imported from them is not kept."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def infect(dense: Path, mark: Path, *parts: str) -> Path:
    """A copy of a checkpoint whose tokenizer, configuration or model is code of its own."""
    folder = mark.with_name(f"malicious-{'-'.join(parts)}")
    shutil.copytree(dense, folder)
    (folder / "evil.py").write_text(MALICE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    classes = {"config": {"AutoConfig": "evil.Config"}, "model": {"AutoModelForCausalLM": "evil.Model"}}
    config["auto_map"] = {key: name for part in parts for key, name in classes.get(part, {}).items()}
    (folder / "config.json").write_text(json.dumps(config))
    if "tokenizer" in parts:
        path = folder / "tokenizer_config.json"
        tokens = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        stated = json.loads(path.read_text()) | {"tokenizer_class": "Tokenizer", "auto_map": tokens}
        path.write_text(json.dumps(stated))
    return folder


COMMANDS: dict[str, tuple[str, ...]] = {
    "score": ("MODEL", "--output", "OUT", "--calibration", "TEXT", "--num-samples", "2", "--seq-len", "16"),
    "prune": ("MODEL", "--output", "OUT", "--width", "32", "--round-to", "8", "--calibration", "TEXT",
              "--num-samples", "2", "--seq-len", "16"),
    "evaluate": ("MODEL", "--text", "TEXT", "--seq-len", "16", "--max-windows", "2"),
    "recover": ("MODEL", "--output", "OUT", "--data", "TEXT", "--distill-weight", "0", "--max-steps", "1",
                "--seq-len", "16", "--lora-r", "4"),
    "compare": ("MODEL", "--output", "OUT", "--criteria", "magnitude,entropy", "--ratios", "0.2", "--round-to", "1",
                "--seeds", "1", "--calibration", "TEXT", "--num-samples", "2", "--seq-len", "16", "--text", "HELD",
                "--max-windows", "1"),
    "inspect": ("MODEL", "--deploy"),
    "generate": ("MODEL", "--prompt", "a", "--max-new-tokens", "2"),
    "push": ("MODEL", "me/model"),
}  # fmt: skip


@pytest.mark.parametrize("parts", [("tokenizer",), ("config", "model")])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_runs_and_nobody_is_asked(
    command: str, parts: tuple[str, ...], world: Path, mark: Path, question: io.StringIO, tmp_path: Path
) -> None:
    places = {"MODEL": infect(world / "dense", mark, *parts), "OUT": tmp_path / "out"}
    places |= {"TEXT": world / "calibration.txt", "HELD": world / "held.txt"}
    result = run(command, *(places.get(word, word) for word in COMMANDS[command]), "--json")
    assert not mark.exists()
    assert question.tell() == 0, "nothing was read from standard input"
    if "tokenizer" in parts and command != "inspect":
        refused(result, "runs no code of a checkpoint; where you trust that code")
        assert result.out == ""
    else:
        assert result.code == 0, result.err
        assert result.json


def test_no_code_runs_where_another_process_loads(
    world: Path, mark: Path, question: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hifiprune.commands.bench.run_program", run_module(tmp_path))
    folder = infect(world / "dense", mark, "tokenizer", "config", "model")
    words = ("--lengths", "4", "--new-tokens", "2", "--rounds", "1", "--repeats", "1")
    result = run("bench", world / "dense", folder, *words, "--json")
    assert not mark.exists()
    assert question.tell() == 0
    assert result.code == 0, result.err
    assert result.json


def test_kernels_of_the_hub_that_a_configuration_names_are_refused(world: Path, tmp_path: Path) -> None:
    for number, config in enumerate(
        (
            {"attn_implementation": "evil/kernel"},
            {"_attn_implementation": "evil/kernel"},
            {"_attn_implementation_internal": {"text_config": "evil/kernel"}},
            {"text_config": {"experts_implementation": {"": "evil/kernel:run"}}},
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(world / "dense", folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        refused(run("inspect", folder), "names code of the hub, evil/kernel")


def test_a_tokenizer_of_its_own_code_is_not_handed_to_llama_cpp(world: Path, mark: Path, tmp_path: Path) -> None:
    folder = infect(world / "dense", mark, "tokenizer")
    words = ("export", folder, "--output", tmp_path / "small.gguf")
    refused(run(*words), "which llama.cpp's converter may run")
    assert not mark.exists()
