"""The commands that study criteria: `criteria`, `compare`, `ablate`."""

from dataclasses import replace
from typing import Annotated

from typer import Option

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import (
    Model,
    Output,
    check_tasks_named,
)
from hifiprune.config.groups import Text
from hifiprune.config.study import AblateConfig, CompareConfig
from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path


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
        list[str] | None, Option(metavar="SOURCE", help="Held-out text to measure every metric on; can be repeated.")
    ] = None,
    perplexity_text: Annotated[
        list[str] | None,
        Option(metavar="SOURCE", help="Held-out text to measure perplexity and entropy alone on, in less time."),
    ] = None,
    max_windows: Annotated[int | None, Option(help="Measure on the first windows of each text only.")] = None,
    *,
    config: CompareConfig,
    given: frozenset[str],
    as_json: bool,
) -> None:
    """Prune by several criteria and compare the results."""
    import hifiprune as hp
    from hifiprune.cli import tables

    check_tasks_named(config.tasks, given)
    length, column = config.calibration.seq_len, config.calibration.text_column
    texts = tuple(Text(source, length, max_windows, True, column) for source in text or ())
    texts += tuple(Text(source, length, max_windows, False, column) for source in perplexity_text or ())
    if not texts and not config.texts:
        raise UserError("'--text' is missing: give it on the command line, or 'texts' in the file of --config")
    record = hp.compare(model, output, replace(config, texts=texts or config.texts))
    show(record.to_dict(), as_json, lambda: tables.compared(record, model, local_path(output)))


@with_config
def ablate(model: Model, output: Output = "ablation", *, config: AblateConfig, as_json: bool) -> None:
    """Ablate neurons and correlate the measured KL divergence with each criterion's scores."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.ablate(model, output, config)
    show(record.to_dict(), as_json, lambda: tables.ablated(record, model, list(config.scores)))
