"""The command that trains: `recover`."""

from dataclasses import asdict
from typing import Annotated

from typer import Argument, Option

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import Output
from hifiprune.config.recover import TRAININGS, RecoverConfig
from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path


@with_config
def recover(
    model: Annotated[str | None, Argument(metavar="MODEL", help="Local folder, hub id or .gguf file.")] = None,
    output: Output = "recovered",
    data: Annotated[
        str | None,
        Option(
            help="Rows to learn from, with the columns text, instruction and output, prompt and response, or messages: "
            "a .txt, .jsonl, .csv or .parquet file, a folder of these, or a hub data set id[:config][:split]."
        ),
    ] = None,
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
    import hifiprune as hp
    from hifiprune.cli import tables

    config.training.refuse_unused(given)
    if show_preset:
        settings = asdict(config.training)
        show(settings, as_json, lambda: tables.settings(settings))
        return
    if model is None:
        raise UserError("recover needs a checkpoint to train: name a folder, hub id or .gguf file")
    if data is None:
        raise UserError("recover needs rows to learn from: give --data")
    record = hp.recover(model, output, data, config)
    show(record.to_dict(), as_json, lambda: tables.recovered(record, local_path(output)))
