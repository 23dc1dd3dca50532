"""The command that hands a checkpoint to other engines: `export`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from hifiprune.cli.console import show
from hifiprune.cli.options import (
    AsJson,
    Debug,
    Model,
    Output,
    Overwrite,
    Quiet,
    Verbose,
)
from hifiprune.io.atomic import local_path


def export(
    model: Model,
    output: Output,
    to: Annotated[str, Option(help="Format: gguf, one file for llama.cpp and what is built on it.")] = "gguf",
    type_: Annotated[
        str,
        Option(
            "--type",
            help="Of the weights: f32, f16, bf16, q8_0, auto for 16 bits; q4_0, q4_k_m and others by llama-quantize.",
        ),
    ] = "auto",
    converter: Annotated[
        str | None,
        Option(help="Folder of llama.cpp, or its converter; if not given, LLAMA_CPP or the PATH tells where it is."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint as a GGUF file, by llama.cpp's own converter."""
    import hifiprune as hp

    facts = hp.export(model, output, to=to, type=type_, converter=converter, overwrite=overwrite)
    show(facts, as_json, lambda: _shown(facts, local_path(output)))


def _shown(facts: dict[str, Any], output: Path) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in facts["tensors"].items())
    typer.echo(f"Wrote {output}: {facts['bytes'] / 1e6:,.1f} MB, tensors: {kinds}.")
    for remark in facts["remarks"]:
        typer.echo(f"Note: {remark}")
    typer.echo(f"Next: llama-cli -m {shlex.quote(str(output))} -p 'The capital of France is' -n 32")
