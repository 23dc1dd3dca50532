"""The commands that show what a pruned model is worth: `evaluate`, `bench`, `report` and `push`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import (
    AsJson,
    Attention,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Limit,
    Overwrite,
    Quiet,
    SeqLen,
    Stream,
    TaskNames,
    TaskPath,
    TextColumn,
    Verbose,
    asked_tasks,
)
from hifiprune.config.bench import BenchConfig


def evaluate(
    models: Annotated[list[str], Argument(metavar="MODEL...", help="Local folders, hub ids or .gguf files.")],
    text: Annotated[
        str | None, Option(help="Text to measure on: any source that --calibration takes but 'self'.")
    ] = None,
    against: Annotated[str | None, Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    seq_len: SeqLen = 1024,
    max_windows: Annotated[int | None, Option(help="Use only the first windows.")] = None,
    text_column: TextColumn = None,
    tasks: TaskNames = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    output: Annotated[
        str | None, Option(metavar="PATH", help="Folder to keep the results in; with it, an interrupted run can go on.")
    ] = None,
    card: Annotated[bool, Option("--card", help="Put what is found into the models' own cards.")] = False,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = None,
    stream: Stream = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, fidelity to the dense model, and zero-shot accuracy, of one model or several."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.evaluate(
        models,
        text,
        against=against,
        tasks=asked_tasks(tasks, task_path, limit),
        seq_len=seq_len,
        max_windows=max_windows,
        text_column=text_column,
        output=output,
        overwrite=overwrite,
        card=card,
        compute=hp.ComputeConfig(device, dtype, batch_size, None, attention, stream),
    )
    show(record.to_dict(), as_json, lambda: tables.evaluated(record, output, card=card))


@with_config
def bench(
    dense: Annotated[str, Argument(metavar="DENSE", help="The dense model: local folder, hub id or .gguf file.")],
    pruned: Annotated[list[str], Argument(metavar="PRUNED...", help="The models to compare with it.")],
    output: Annotated[str | None, Option(metavar="PATH", help="Folder to keep the results in.")] = None,
    *,
    config: BenchConfig,
    as_json: bool,
) -> None:
    """Benchmark prefill and decode speed against the dense model, and against what operations promise."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.bench(dense, pruned, config, output)
    show(record.to_dict(), as_json, lambda: tables.benched(record))


def report(
    folders: Annotated[
        list[Path],
        Argument(metavar="DIR...", help="Outputs of prune, recover, compare, evaluate --output and bench --output."),
    ],
    output: Annotated[str, Option(metavar="PATH", help="The page to make.")] = "report.html",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what runs did, in one page that needs no network."""
    import hifiprune as hp

    made = hp.report(folders, output, overwrite=overwrite)
    show({"report": str(made)}, as_json, lambda: typer.echo(f"Open {made} in a browser."))


def push(
    folder: Annotated[str, Argument(metavar="DIR", help="A checkpoint's folder.")],
    repository: Annotated[str, Argument(metavar="OWNER/NAME", help="Its name on the hub.")],
    private: Annotated[bool, Option("--private", help="Only its owner sees it, where it is new.")] = False,
    upload: Annotated[bool, Option("--upload", help="Do it; else only show what would be uploaded.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Upload a checkpoint to the hub; without --upload, show what would be."""
    import hifiprune as hp
    from hifiprune.cli import tables

    facts = hp.push(folder, repository, private=private, upload=upload)
    show(facts, as_json, lambda: tables.pushed(facts, folder))
