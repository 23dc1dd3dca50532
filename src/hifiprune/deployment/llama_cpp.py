"""Find and run llama.cpp's own programs, with progress; they are never downloaded."""

import os
import re
import shutil
import subprocess
import sys
from collections import deque
from importlib.util import find_spec
from pathlib import Path

from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import local_path
from hifiprune.progress import track

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
ON_PATH = (SCRIPT, "llama-convert-hf-to-gguf")
"""Names of the converter as a command; packages of llama.cpp install the second."""
NEEDED = "sentencepiece"
"""Package that the converter always imports and hifiprune does not."""
GET = (
    "get it with 'git clone --depth 1 https://github.com/ggml-org/llama.cpp' and 'pip install sentencepiece', then "
    f"give --converter llama.cpp or set {VARIABLE}"
)
PROGRESS = re.compile(r"^Writing: +(\d+)%|^\[ *(\d+)/ *(\d+)\]")
"""Progress lines of the converter and of the quantizer."""


def find_converter(given: str | Path | None = None) -> list[str]:
    """Find the command that runs llama.cpp's converter from checkpoints to GGUF.

    A script runs in this Python, whose transformers wrote the checkpoint; the one that llama.cpp pins cannot read it.

    Args:
        given: script, command, or folder that holds the script; by default `LLAMA_CPP`, then the PATH.

    Raises:
        UserError: there is none, or a package that it needs is missing.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        path = local_path(named)
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"there is no converter {path}, by {'--converter' if given else VARIABLE}; {GET}")
    else:
        found = next(filter(None, map(shutil.which, ON_PATH)), None)
        if found is None:
            raise UserError(f"GGUF files are made by llama.cpp's {SCRIPT}, which was not found; {GET}")
        path = Path(found)
    if path.suffix != ".py":
        return [str(path.absolute())]
    if find_spec(NEEDED) is None:
        raise UserError(f"llama.cpp's {SCRIPT} needs {NEEDED}, which is not installed; run: pip install {NEEDED}")
    return [sys.executable, str(path.absolute())]


def find_quantizer(converter: list[str], wanted: str) -> list[str]:
    """Find the command that quantizes a GGUF file: `llama-quantize`, or llama-cpp-python instead.

    Args:
        converter: the converter's command; llama.cpp's programs are built beside its script.
        wanted: requested type, for the message.

    Raises:
        UserError: there is neither.
    """
    built = Path(converter[-1]).parent / "build" / "bin"
    found = shutil.which("llama-quantize") or shutil.which("llama-quantize", path=str(built))
    if found:
        return [found]
    if find_spec("llama_cpp"):
        return [sys.executable, "-m", "hifiprune.deployment.llama_quantize"]
    raise UserError(
        f"type {wanted} is made by llama.cpp's llama-quantize, which is neither on the PATH nor in {built}: build "
        "llama.cpp, or run 'pip install llama-cpp-python'; f32, f16, bf16 and q8_0 do without"
    )


def run(command: list[str], what: str) -> None:
    """Run a program of llama.cpp to its end, without network, and tell how far it is.

    Raises:
        RunError: it cannot be run or fails; the message has the last lines that it said.
    """
    said: deque[str] = deque(maxlen=3)
    reached = 0.0
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise RunError(f"{what} could not start: {command[0]}: {error.strerror}") from error
    with process:
        assert process.stdout
        try:
            for percent in track(range(1, 101), what):
                while reached < percent and (line := process.stdout.readline()):
                    reached = max(reached, _percent(line))
                    _keep(line, said)
            for line in process.stdout:
                _keep(line, said)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = " / ".join(said)[-400:] or "it said nothing"
        raise RunError(f"{what} failed with exit code {process.returncode}: {last}; a newer llama.cpp may do better")


def _keep(line: str, said: deque[str]) -> None:
    if line.strip() and not PROGRESS.match(line):
        said.append(line.strip())


def _percent(line: str) -> float:
    found = PROGRESS.match(line)
    if found is None:
        return 0.0
    return float(found[1]) if found[1] else 100 * int(found[2]) / int(found[3])
