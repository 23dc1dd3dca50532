"""Flags of several commands that are not options of their configs, each declared once, and what these flags do."""

import os
import re
import sys
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from huggingface_hub import constants
from typer import Argument, Option

from hifiprune.bounds import FEW, check_number
from hifiprune.config.options import COMPUTE
from hifiprune.errors import UserError

if TYPE_CHECKING:
    from hifiprune.config.evaluate import Tasks

Model = Annotated[str, Argument(metavar="MODEL", help="Local folder, hub id or .gguf file.")]
Output = Annotated[
    str,
    Option(
        metavar="PATH", help="File (score, table, export) or folder to create; it appears only when it is complete."
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.", metavar="")]


def keyword(name: str, annotation: Any, default: Any) -> Parameter:
    """Return a parameter of a typer command."""
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _flag(name: str, spelling: str, help: str, *, panel: str, kind: Any = bool, **facts: Any) -> Parameter:
    """Return the parameter for a flag: a switch, unless it takes a value of a kind."""
    words = spelling.split()
    flag = Option(*words, help=help, rich_help_panel=panel, **facts)
    return keyword(name, Annotated[kind if kind is bool else kind | None, flag], False if kind is bool else None)


HUB, FILES = "Hugging Face hub", "Config and messages"
REVISION = _flag(
    "revision",
    "--revision",
    "Commit, branch or tag of MODEL on the hub; MODEL@REVISION means the same.",
    panel=HUB,
    kind=str,
    show_default="main",
)
TOKEN = _flag(
    "token",
    "--token",
    "Access token for private and gated models. HF_TOKEN or 'hf auth login' are safer: other users of the machine can "
    "see a command line.",
    panel=HUB,
    kind=str,
    show_default="HF_TOKEN, or that of the login",
)
THREADS = _flag(
    "threads",
    "--threads",
    "Number of CPU threads to compute on.",
    panel=COMPUTE,
    kind=int,
    show_default="PyTorch's choice",
)
CONFIG_FILE = _flag(
    "config_file",
    "--config",
    "Options in a YAML or JSON file, or the run.json of an earlier run, to repeat it; flags override it.",
    panel=FILES,
    kind=Path,
    metavar="FILE",
)
MESSAGES = [
    _flag("quiet", "--quiet -q", "Show only warnings and errors, and no progress.", panel=FILES),
    _flag("verbose", "--verbose -v", "Also show each stage and how long it took.", panel=FILES),
    _flag("as_json", "--json", "Print one JSON object on standard output.", panel=FILES),
    _flag("debug", "--debug", "Show the traceback of an error.", panel=FILES),
]
"""Flags of every command."""


def set_threads(threads: int | None) -> None:
    """Compute on so many CPU threads, if a number is given.

    Raises:
        UserError: the number is out of range.
    """
    if threads is not None:
        check_number("threads", threads, FEW)
        import torch

        torch.set_num_threads(threads)


def use_token(token: str | None) -> None:
    """Have the hub's library send this access token, also in processes that are started; take it out of `sys.argv`.

    Nothing that prints or records the command line can then tell it.

    Raises:
        UserError: it holds characters that no token has, which the message does not show, or would not be sent.
    """
    if token is None:
        return
    words = [word for word in sys.argv if not word.startswith("--token=")]
    if "--token" in words:
        place = words.index("--token")
        del words[place : place + 2]
    sys.argv = words
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("--token is empty, or has spaces or letters that no access token has; copy it again")
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        raise UserError("--token is not sent while the variable HF_HUB_DISABLE_IMPLICIT_TOKEN is set: unset it")
    os.environ["HF_TOKEN"] = token


def check_tasks_named(tasks: "Tasks | None", given: frozenset[str]) -> None:
    """Refuse what is said of tasks where none is named.

    Args:
        tasks: zero-shot tasks, if any are named.
        given: names of the flags that were given.

    Raises:
        UserError: there is none, and something is said of them.
    """
    if tasks is None and given & {"task_path", "limit"}:
        raise UserError("--task-path and --limit need --tasks with the names of tasks")
