"""The command line: parses, calls the pipeline, prints."""

import errno
import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer
from typer import Option
from typer.exceptions import TyperException

from hifiprune.cli import commands
from hifiprune.cli.console import hush_torchao
from hifiprune.cli.signals import Stopped, handle_signals
from hifiprune.cli.usage import Command, Commands, explain
from hifiprune.errors import HifipruneError
from hifiprune.io.distributed import check_command, follow_first, leave
from hifiprune.progress import console
from hifiprune.version import __version__

app = typer.Typer(
    name="hifiprune",
    cls=Commands,
    help="Make a large language model smaller by removing the MLP neurons that its predictions depend on least.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(f"hifiprune {__version__}")
        raise typer.Exit


for command in (
    commands.demo, commands.inspect, commands.prune, commands.score, commands.table, commands.evaluate,
    commands.criteria, commands.compare, commands.ablate, commands.recover, commands.bench, commands.report,
    commands.export, commands.generate, commands.push,
):  # fmt: skip
    app.command(cls=Command, short_help=command.__doc__)(command)


UNWRITABLE = (errno.ENOSPC, errno.EPIPE, errno.EIO)
"""What is answered to writing on a disk that is full, and to where nobody reads."""


def main() -> None:
    """Run the command line; a failure is one message and an exit code: 2 for the user's mistakes, 1 for the rest."""
    handle_signals()
    hush_torchao()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the locale has no such letters
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - no library asks: whoever does gets no answer
    code = 1
    try:
        code = _run()
    finally:
        leave(code)
    sys.exit(code)


def _run() -> int:
    """Run the command; return the exit code, after saying what went wrong."""
    try:
        check_command(sys.argv)
        words = sys.argv[1:]
        done = app(words or ["--help"], prog_name="hifiprune", standalone_mode=False)
        code = follow_first(done or (0 if words else 2))
        sys.stdout.flush()
        return code
    except TyperException as error:
        return _fail(error, explain(error), error.exit_code)
    except HifipruneError as error:
        return _fail(error, str(error), error.exit_code)
    except Stopped as error:
        return _fail(error, str(error), 1)
    except OSError as error:  # outputs are written by `replacing`, which says what is wrong with them
        return _fail(error, *_told(error))
    except Exception as error:  # noqa: BLE001 - the edge: whatever is left is our bug, said in one line
        message = f"{type(error).__name__}: {error} (a bug in hifiprune or a library; --debug shows where)"
        return _fail(error, message, 1)


def _told(error: OSError) -> tuple[str, int]:
    """Return what to say of a file that failed, and the exit code."""
    if error.filename:
        return f"{error.filename}: {error.strerror}; check that it is there, and that you may read it", 2
    if error.errno in UNWRITABLE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would fail once more when it ends
        return f"standard output cannot be written: {error.strerror}", 1
    return str(error), 2


def _fail(error: BaseException, message: str, code: int) -> int:
    if "--debug" in sys.argv:
        raise error
    if message:  # there is none where the help was shown
        console(stderr=True).print(f"error: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    return code
