"""Copies of this process, which has imported everything already: they start at once."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import mkdtemp
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from hifiprune.cli.app import main

PATIENCE = 120.0
"""Seconds that all of them have."""


@dataclass(frozen=True)
class Ended:
    """What they left: every exit code, and what they wrote, all in one."""

    codes: list[int | None]
    out: str
    err: str


def command(*words: object, before: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """The command line, after something else."""

    def work() -> None:
        before()
        sys.argv = ["hifiprune", *map(str, words)]
        main()

    return work


def start(folder: Path, work: Callable[[], None], processes: int = 1) -> list[BaseProcess]:
    """Start them, as a launcher does where there are several; they write into files in the folder."""
    context, port = multiprocessing.get_context("fork"), free_port()
    started: list[BaseProcess] = []
    for rank in range(processes):
        process = context.Process(target=_run, args=(folder, work, rank, processes, port))
        process.start()
        started.append(process)
    return started


def forked(folder: Path, work: Callable[[], None], processes: int = 1) -> Ended:
    """Start them and wait; where one fails the others are ended, as launchers do."""
    folder.mkdir()
    started = start(folder, work, processes)
    left = started
    while left:
        ready = wait([process.sentinel for process in left], PATIENCE)
        failed = not ready or any(process.exitcode for process in left)
        left = [process for process in left if process.exitcode is None]
        for process in left if failed else ():
            process.terminate()
    for process in started:
        process.join()
    return Ended([process.exitcode for process in started], (folder / "1").read_text(), (folder / "2").read_text())


def run_module(folder: Path) -> Callable[[Sequence[str]], CompletedProcess[str]]:
    """Return what stands for `run_program` where a module of ours is run: a copy of this process runs it.

    Args:
        folder: where the processes write.
    """

    def run(command: Sequence[str]) -> CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-m"]

        def work() -> None:
            sys.argv = [*command[2:]]
            runpy.run_module(command[2], run_name="__main__")

        ended = forked(Path(mkdtemp(dir=folder)) / "told", work)
        return CompletedProcess(command, ended.codes[0] or 0, ended.out, ended.err)

    return run


class Copy:
    """What stands for `subprocess.Popen` where llama.cpp's converter is run: a copy of this process runs it.

    Args:
        command: a Python interpreter, the script, and its arguments.
        env: the environment.
        foreign: packages that the script brings along.
        before: what to do first.
    """

    returncode: int | None = None

    def __init__(
        self, command: list[str], *, env: dict[str, str], foreign: Sequence[str] = (),
        before: Callable[[], None] = lambda: None, **_: Any,
    ):  # fmt: skip
        reading, writing = os.pipe()
        self.stdout = open(reading)  # noqa: SIM115

        def work() -> None:
            _write_to(writing, writing)
            os.environ.update(env)
            for name in [name for name in sys.modules if name.partition(".")[0] in foreign]:
                del sys.modules[name]
            sys.path[:0] = [str(Path(command[1]).parent / place) for place in (".", "gguf-py")]
            before()
            sys.argv = command[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")

        self._process = multiprocessing.get_context("fork").Process(target=work)
        self._process.start()
        os.close(writing)

    def __enter__(self) -> "Copy":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self._process.join()
        self.returncode = self._process.exitcode


def _write_to(out: int, err: int) -> None:
    """Have this process write into other files."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115


def _run(folder: Path, work: Callable[[], None], rank: int, processes: int, port: int) -> None:
    out, err = (os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("1", "2"))
    _write_to(out, err)
    if processes > 1:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in facts.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        AcceleratorState._reset_state(reset_partial_state=True)  # what this process was when it was alone
        GradientState._reset_state()
    work()


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
