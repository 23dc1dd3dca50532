"""Output of commands: messages and progress on standard error, results on standard output."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from hifiprune.errors import UserError
from hifiprune.io.distributed import rank
from hifiprune.progress import console, shown


def hush_torchao() -> None:
    """Silence torchao, which transformers imports if installed, and which warns about missing GPU kernels."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def speaking(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Show messages and progress on standard error, and keep transformers from showing its own.

    Raises:
        UserError: both are asked for.
    """
    if quiet and verbose:
        raise UserError("--quiet and --verbose exclude each other: give one of them")
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    with shown(console(stderr=True), level):
        yield


def show(results: Any, as_json: bool, table: Callable[[], None]) -> None:
    """Print results as one JSON object, or as a table, if this is the first process."""
    if rank() > 0:
        return
    if as_json:
        from hifiprune.io.json_files import to_plain

        typer.echo(json.dumps(to_plain(results), default=str))
    else:
        table()
