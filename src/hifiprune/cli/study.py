"""The commands that study criteria: `criteria`, `compare`, `ablate`."""

from typing import Annotated

from typer import Option

from hifiprune.bounds import meant
from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import (
    SOURCES,
    Alpha,
    AsJson,
    Attention,
    BatchSize,
    Debug,
    Device,
    Dtype,
    LabelSamples,
    LightCut,
    Limit,
    Model,
    NumSamples,
    Output,
    Overwrite,
    Quiet,
    Recompute,
    RoundTo,
    Sampler,
    Seed,
    SeqLen,
    TaskNames,
    TaskPath,
    Temperature,
    TextColumn,
    Verbose,
    asked_tasks,
    drawn_from,
    listed,
)
from hifiprune.config.study import AblateConfig
from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path


def criteria(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the criteria, a line each."""
    from hifiprune.cli import tables
    from hifiprune.scoring.criteria import describe_criteria

    facts = describe_criteria()
    show(facts, as_json, lambda: tables.criteria_listed(facts))


def compare(
    model: Model,
    output: Output,
    calibration: Annotated[list[str], Option(help=SOURCES)],
    text: Annotated[list[str], Option(help="Held-out text to measure every metric on; may be given more than once.")],
    criteria: Annotated[
        str, Option(help="Names separated by commas; the others are compared with the first.")
    ] = f"hfprune,{DEFAULT_CRITERION},cross-entropy,wanda-sp",
    ratios: Annotated[str, Option(help="Fractions of all parameters to remove, separated by commas.")] = "0.2,0.3",
    seeds: Annotated[int, Option(help="Draws of the calibration windows.")] = 3,
    perplexity_text: Annotated[
        list[str] | None, Option(help="Text to measure perplexity and entropy alone on, in less time.")
    ] = None,
    max_windows: Annotated[int | None, Option(help="Measure on the first windows of each text only.")] = None,
    tasks: TaskNames = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    num_samples: NumSamples = 128,
    seq_len: SeqLen = 1024,
    seed: Seed = 0,
    sampler: Sampler = "auto",
    text_column: TextColumn = None,
    alpha: Alpha = None,
    temperature: Temperature = None,
    light_cut: LightCut = 0.025,
    label_samples: LabelSamples = 1,
    round_to: RoundTo = 128,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    recompute: Recompute = None,
    attention: Attention = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Prune by several criteria, measure each, and show which keeps this model best."""
    import hifiprune as hp
    from hifiprune.cli import tables

    plain = [hp.Text(source, seq_len, max_windows, text_column=text_column) for source in text]
    cheap = [hp.Text(source, seq_len, max_windows, False, text_column) for source in perplexity_text or []]
    record = hp.compare(
        model,
        output,
        listed(criteria),
        [_number(ratio) for ratio in listed(ratios)],
        drawn_from(calibration, num_samples, seq_len, seed, sampler, text_column),
        plain + cheap,
        seeds=seeds,
        options=hp.CriterionOptions(alpha, temperature, light_cut, label_samples),
        tasks=asked_tasks(tasks, task_path, limit),
        round_to=round_to,
        compute=hp.ComputeConfig(device, dtype, batch_size, recompute, attention),
        overwrite=overwrite,
    )
    show(record.to_dict(), as_json, lambda: tables.compared(record, model, local_path(output)))


@with_config
def ablate(model: Model, output: Output = "ablation", *, config: AblateConfig, as_json: bool) -> None:
    """Test criteria: really remove neurons and see how well each score tells the damage."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.ablate(model, output, config)
    show(record.to_dict(), as_json, lambda: tables.ablated(record, model, list(config.scores)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"ratio '{text}' is no number{meant(text)}; give fractions such as 0.2,0.3") from error
