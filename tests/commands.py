"""Running the command line in this process, and what its refusals look like."""

import json
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from hifiprune.cli.app import main

MESSAGE_LIMIT = 600


class Interruption(BaseException):
    """What stops a run in tests; no library catches it."""


class Result:
    """What a run of the command line left: exit code, output, messages."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


def run(*arguments: object) -> Result:
    """Run the command line in this process; its signal handlers do not outlast it."""
    out, err = StringIO(), StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["hifiprune", *map(str, arguments)])
            patch.setattr(sys, "stdin", sys.stdin)
            with pytest.raises(SystemExit) as stopped:
                main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = stopped.value.code
    return Result(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def refused(result: Result, message: str, code: int = 2) -> None:
    """One clear message with the right exit code and no traceback."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    last = result.err[result.err.rindex("error: ") :]
    assert message in last
    assert len(last) < MESSAGE_LIMIT


def leftovers(folder: Path) -> list[str]:
    """Half-written outputs."""
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
