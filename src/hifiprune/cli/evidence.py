"""The commands that show what a pruned model is worth: `evaluate`, `bench`, `report` and `push`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import (
    Overwrite,
    check_tasks_named,
)
from hifiprune.config.bench import BenchConfig
from hifiprune.config.evaluate import EvaluateConfig


@with_config
def evaluate(
    models: Annotated[list[str], Argument(metavar="MODEL...", help="Local folders, hub ids or .gguf files.")],
    output: Annotated[
        str | None,
        Option(metavar="PATH", help="Folder to keep the results in; with it, an interrupted run can be continued."),
    ] = None,
    *,
    config: EvaluateConfig,
    given: frozenset[str],
    as_json: bool,
) -> None:
    """Measure perplexity, fidelity to the dense model, and zero-shot accuracy, of one model or several."""
    import hifiprune as hp
    from hifiprune.cli import tables

    check_tasks_named(config.tasks, given)
    record = hp.evaluate(models, config, output)
    show(record.to_dict(), as_json, lambda: tables.evaluated(record, output, card=config.card))


@with_config
def bench(
    dense: Annotated[str, Argument(metavar="DENSE", help="The dense model: local folder, hub id or .gguf file.")],
    pruned: Annotated[list[str], Argument(metavar="PRUNED...", help="The models to compare with it.")],
    output: Annotated[str | None, Option(metavar="PATH", help="Folder to keep the results in.")] = None,
    *,
    config: BenchConfig,
    as_json: bool,
) -> None:
    """Benchmark prefill and decode speed against the dense model and the theoretical speed-up."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.bench(dense, pruned, config, output)
    show(record.to_dict(), as_json, lambda: tables.benched(record))


@with_config
def report(
    folders: Annotated[
        list[Path],
        Argument(metavar="DIR...", help="Outputs of prune, recover, compare, evaluate --output and bench --output."),
    ],
    output: Annotated[str, Option(metavar="PATH", help="The page to make.")] = "report.html",
    overwrite: Overwrite = False,
    *,
    as_json: bool,
) -> None:
    """Create a self-contained HTML report of one or more runs."""
    import hifiprune as hp

    made = hp.report(folders, output, overwrite=overwrite)
    show({"report": str(made)}, as_json, lambda: typer.echo(f"Open {made} in a browser."))


@with_config
def push(
    folder: Annotated[str, Argument(metavar="DIR", help="A checkpoint's folder.")],
    repository: Annotated[str, Argument(metavar="OWNER/NAME", help="Its name on the hub.")],
    private: Annotated[bool, Option("--private", help="Make the repository private if it is created now.")] = False,
    upload: Annotated[bool, Option("--upload", help="Upload; otherwise only show what would be uploaded.")] = False,
    *,
    as_json: bool,
) -> None:
    """Upload a checkpoint to the hub; a dry run without --upload."""
    import hifiprune as hp
    from hifiprune.cli import tables

    facts = hp.push(folder, repository, private=private, upload=upload)
    show(facts, as_json, lambda: tables.pushed(facts, folder))
