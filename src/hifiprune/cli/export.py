"""The command that hands a checkpoint to other engines: `export`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import Output
from hifiprune.config.export import ExportConfig
from hifiprune.io.atomic import local_path


@with_config
def export(
    model: Annotated[str, Argument(metavar="MODEL", help="Local folder or hub id.")],
    output: Output,
    config: ExportConfig,
    *,
    as_json: bool,
) -> None:
    """Write a checkpoint as a GGUF file, by llama.cpp's own converter."""
    import hifiprune as hp

    facts = hp.export(model, output, config)
    show(facts, as_json, lambda: _shown(facts, local_path(output)))


def _shown(facts: dict[str, Any], output: Path) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in facts["tensors"].items())
    typer.echo(f"Wrote {output}: {facts['bytes'] / 1e6:,.1f} MB, tensors: {kinds}.")
    for remark in facts["remarks"]:
        typer.echo(f"Note: {remark}")
    typer.echo(f"Next: llama-cli -m {shlex.quote(str(output))} -p 'The capital of France is' -n 32")
