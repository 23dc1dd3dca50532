"""All commands: each takes its config from flags and files, calls the function of its name, and prints the result."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

import hifiprune as hp
from hifiprune.cli.common import Model, Output, Overwrite, check_tasks_named
from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.config.bench import BenchConfig
from hifiprune.config.demo import DemoConfig
from hifiprune.config.evaluate import EvaluateConfig
from hifiprune.config.export import ExportConfig
from hifiprune.config.generate import GenerateConfig
from hifiprune.config.prune import PruneConfig, ScoreConfig, TableConfig
from hifiprune.config.recover import TRAININGS, RecoverConfig
from hifiprune.config.study import AblateConfig, CompareConfig
from hifiprune.config.texts import Text
from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path


@with_config
def demo(
    output: Annotated[str, Option(metavar="PATH", help="Folder for the models and the results.")] = "demo-out",
    config: DemoConfig = DemoConfig(),
    *,
    as_json: bool,
) -> None:
    """Prune a small model by 20% on this machine and measure its fidelity."""
    from hifiprune.cli import tables
    from hifiprune.commands import demo

    record = demo.run(output, config)
    show(record.to_dict(), as_json, lambda: tables.demonstrated(record, output))


@with_config
def inspect(
    model: Model,
    deploy: Annotated[
        bool, Option("--deploy", help="Check compatibility with inference engines and number formats.")
    ] = False,
    *,
    as_json: bool,
) -> None:
    """Show a model's MLPs and the width for each pruning ratio, without loading weights."""
    from hifiprune.cli import engine_table, tables

    results = hp.inspect(model, deploy=deploy)
    show(results, as_json, partial(engine_table.deployable if deploy else tables.inspected, results))


@with_config
def prune(model: Model, output: Output, config: PruneConfig, *, as_json: bool) -> None:
    """Prune a checkpoint: remove the least important MLP neurons, and repair the rest."""
    from hifiprune.cli import tables

    record = hp.prune(model, output, config)
    told = partial(tables.foreseen, record) if config.dry_run else partial(tables.pruned, record, local_path(output))
    show(record.to_dict(), as_json, told)


@with_config
def score(model: Model, output: Output, config: ScoreConfig, *, as_json: bool) -> None:
    """Score every neuron once; then prune at any ratio in seconds."""
    from hifiprune.cli import tables

    record = hp.score_checkpoint(model, output, config)
    told = partial(tables.foreseen, record)
    if not config.dry_run:
        told = partial(tables.scored, record, model, local_path(output))
    show(record.to_dict(), as_json, told)


@with_config
def table(model: Model, output: Output, config: TableConfig, *, as_json: bool) -> None:
    """Measure what every width of every MLP costs; then prune by the best widths at any ratio."""
    from hifiprune.cli import tables

    record = hp.table_checkpoint(model, output, config)
    show(record.to_dict(), as_json, partial(tables.widths_measured, record, model, local_path(output)))


@with_config
def evaluate(
    models: Annotated[
        list[str],
        Argument(metavar="MODEL", help="Local folders, hub ids (OWNER/NAME, or OWNER/NAME@REVISION) or .gguf files."),
    ],
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
    from hifiprune.cli import measurement_tables

    check_tasks_named(config.tasks, given)
    record = hp.evaluate(models, config, output)
    show(record.to_dict(), as_json, lambda: measurement_tables.evaluated(record, output, card=config.card))


@with_config
def criteria(*, as_json: bool) -> None:
    """List the scoring criteria."""
    from hifiprune.cli import tables
    from hifiprune.scoring.criteria import describe_criteria

    facts = describe_criteria()
    show(facts, as_json, lambda: tables.criteria_listed(facts))


@with_config
def compare(
    model: Model,
    output: Output,
    text: Annotated[
        list[str] | None,
        Option(
            metavar="SOURCE",
            help="Held-out text to measure every metric on: any source that --calibration takes but 'self'. Repeat it "
            "for several; give this, --perplexity-text or both.",
        ),
    ] = None,
    perplexity_text: Annotated[
        list[str] | None,
        Option(
            metavar="SOURCE",
            help="Held-out text to measure only perplexity and entropy on, in less time. Repeat it for several.",
        ),
    ] = None,
    max_windows: Annotated[int | None, Option(help="Measure on the first windows of each text only.")] = None,
    *,
    config: CompareConfig,
    given: frozenset[str],
    as_json: bool,
) -> None:
    """Prune by several criteria and compare the results."""
    from hifiprune.cli import measurement_tables

    check_tasks_named(config.tasks, given)
    length, column = config.calibration.seq_len, config.calibration.text_column
    texts = tuple(Text(source, length, max_windows, True, column) for source in text or ())
    texts += tuple(Text(source, length, max_windows, False, column) for source in perplexity_text or ())
    if not texts and not config.texts:
        raise UserError("'--text' is missing: give it on the command line, or 'texts' in the file of --config")
    record = hp.compare(model, output, replace(config, texts=texts or config.texts))
    show(record.to_dict(), as_json, lambda: measurement_tables.compared(record, model, local_path(output)))


@with_config
def ablate(model: Model, output: Output = "ablation", *, config: AblateConfig, as_json: bool) -> None:
    """Ablate neurons and correlate the measured KL divergence with each criterion's scores."""
    from hifiprune.cli import measurement_tables

    record = hp.ablate(model, output, config)
    show(record.to_dict(), as_json, lambda: measurement_tables.ablated(record, model, list(config.scores)))


@with_config
def recover(
    model: Model,
    data: Annotated[
        str,
        Option(
            metavar="SOURCE",
            help="Training data: rows with the columns text, instruction and output, prompt and response, or messages; "
            "a .txt, .jsonl, .csv or .parquet file, a folder of these, or a hub data set id[:config][:split].",
        ),
    ],
    output: Output = "recovered",
    preset: Annotated[
        str,
        Option(
            help=f"Settings for all that is not given: {', '.join(TRAININGS)}; all but default are a paper's settings."
        ),
    ] = "default",
    show_preset: Annotated[
        bool, Option("--show-preset", help="Show the preset's settings, then stop.", metavar="")
    ] = False,
    *,
    config: RecoverConfig,
    given: frozenset[str],
    as_json: bool,
) -> None:
    """Fine-tune a pruned model, by distillation or on labels, to recover quality."""
    from hifiprune.cli import tables

    config.training.refuse_unused(given)
    if show_preset:
        settings = asdict(config.training)
        show(settings, as_json, lambda: tables.settings(settings))
        return
    record = hp.recover(model, output, data, config)
    show(record.to_dict(), as_json, lambda: tables.recovered(record, local_path(output)))


@with_config
def bench(
    dense: Annotated[str, Argument(metavar="DENSE", help="The dense model: local folder, hub id or .gguf file.")],
    pruned: Annotated[list[str], Argument(metavar="PRUNED", help="The models to compare with it.")],
    output: Annotated[str | None, Option(metavar="PATH", help="Folder to keep the results in.")] = None,
    *,
    config: BenchConfig,
    as_json: bool,
) -> None:
    """Benchmark prefill and decode speed against the dense model and the theoretical speed-up."""
    from hifiprune.cli import measurement_tables

    record = hp.bench(dense, pruned, config, output)
    show(record.to_dict(), as_json, lambda: measurement_tables.benched(record))


@with_config
def report(
    folders: Annotated[
        list[Path],
        Argument(metavar="DIR", help="Outputs of prune, recover, compare, evaluate --output and bench --output."),
    ],
    output: Annotated[str, Option(metavar="PATH", help="The page to make.")] = "report.html",
    overwrite: Overwrite = False,
    *,
    as_json: bool,
) -> None:
    """Create a self-contained HTML report of one or more runs."""

    made = hp.report(folders, output, overwrite=overwrite)
    show({"report": str(made)}, as_json, lambda: typer.echo(f"Open {made} in a browser."))


@with_config
def export(
    model: Annotated[str, Argument(metavar="MODEL", help="Local folder or hub id.")],
    output: Output,
    config: ExportConfig,
    *,
    as_json: bool,
) -> None:
    """Write a checkpoint as a GGUF file, by llama.cpp's own converter."""
    from hifiprune.cli import tables

    results = hp.export(model, output, config)
    show(results, as_json, lambda: tables.exported(results, local_path(output)))


@with_config
def generate(model: Model, config: GenerateConfig, *, as_json: bool) -> None:
    """Continue a prompt, and show where a second model (--against) parts from it."""
    from hifiprune.cli import tables

    results = hp.generate(model, config)
    show(results, as_json, lambda: tables.generated(results))


@with_config
def push(
    folder: Annotated[str, Argument(metavar="DIR", help="Folder of the checkpoint.")],
    repository: Annotated[str, Argument(metavar="OWNER/NAME", help="Name of the repository on the hub.")],
    private: Annotated[bool, Option("--private", help="Make the repository private if it is created now.")] = False,
    upload: Annotated[bool, Option("--upload", help="Upload; otherwise only show what would be uploaded.")] = False,
    *,
    as_json: bool,
) -> None:
    """Upload a checkpoint to the hub; a dry run without --upload."""
    from hifiprune.cli import tables

    results = hp.push(folder, repository, private=private, upload=upload)
    show(results, as_json, lambda: tables.pushed(results, folder))
