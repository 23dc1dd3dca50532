"""Texts are UTF-8, whatever the locale."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hifiprune

SOURCE = Path(hifiprune.__file__).parent
OPENERS = ("open", "read_text", "write_text")
"""Methods that take an encoding; `open` is a function too."""


def without_encoding(tree: ast.AST) -> list[int]:
    """The lines of calls that open a text in the locale's encoding."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            call = ast.unparse(node.func)
            opens = call == "open" or (call != "os.open" and call.rpartition(".")[2] in OPENERS and "." in call)
            binary = any(ast.unparse(argument) in ("'rb'", "'wb'", "'ab'", "'r+b'") for argument in node.args)
            if "encoding" not in words and ((opens and not binary) or words.get("text") == "True"):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.name)
def test_every_text_is_opened_as_utf8(path: Path) -> None:
    assert without_encoding(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_calls_without_encoding_are_found() -> None:
    code = "open('x')\np.read_text()\nopen('x', 'rb')\nopen('x', encoding='utf-8')\nrun(w, text=True)\np.open('w')\n"
    assert without_encoding(ast.parse(code)) == [1, 2, 5, 6]


ONE_BY_ONE = """
import sys
from itertools import groupby
from hifiprune.cli.app import main

codes = []
for given, words in groupby(sys.argv[1:], lambda word: word != "/"):
    if given:
        sys.argv = ["hifiprune", *words]
        try:
            main()
        except SystemExit as ended:
            codes.append(ended.code or 0)
print(codes)
"""
"""Command lines in one process, a stroke between them, and their exit codes."""


def test_files_and_names_in_an_ascii_locale(world: Path, tmp_path: Path) -> None:
    locale = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    shutil.copytree(world / "dense", tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text().replace("{", '{"_about": "mod\u00e8le",', 1), encoding="utf-8")
    cut = ("prune", tmp_path / "dense", "--width", 24, "--criterion", "magnitude", "--output")
    words = [*cut, tmp_path / "small", "/", *cut, tmp_path / "mod\u00e8le", "/"]
    words += ["report", tmp_path / "small", "--output", tmp_path / "r.html"]
    command = [sys.executable, "-c", ONE_BY_ONE, *map(str, words)]
    done = subprocess.run(command, env=locale, capture_output=True, check=False)
    assert done.stdout.decode("ascii").splitlines()[-1] == "[0, 2, 0]", done.stderr
    assert b"no UTF-8: rename it, or set LC_ALL=C.UTF-8 if it is" in done.stderr
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "mod\u00e8le" in (tmp_path / "small" / "config.json").read_text(encoding="utf-8")


@pytest.mark.exhaustive  # two fresh processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_results_that_cannot_be_printed() -> None:
    for words in (["criteria"], ["--version"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "hifiprune", *words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "error: standard output cannot be written: No space left on device\n"
