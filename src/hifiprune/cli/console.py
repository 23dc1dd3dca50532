"""What commands say: remarks and progress on standard error, results on standard output."""

import json
import logging
from collections.abc import Callable
from typing import Any

import typer

from hifiprune.io.distributed import rank
from hifiprune.progress import SILENT, Voice, console


def hush_torchao() -> None:
    """Where it is installed transformers imports it, and it warns of GPU kernels that a CPU does not miss."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def voice() -> Voice:
    """Speak on standard error, if this is the first process, and keep transformers from speaking too."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    return Voice(console(stderr=True)) if rank() == 0 else SILENT


def show(facts: Any, as_json: bool, table: Callable[[], None]) -> None:
    """Print facts as one JSON object, or as a table, if this is the first process."""
    if rank() > 0:
        return
    if as_json:
        typer.echo(json.dumps(facts, default=str))
    else:
        table()
