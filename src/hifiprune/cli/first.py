"""The commands to begin with: `demo` and `inspect`."""

from functools import partial
from typing import Annotated

from typer import Option

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import Model
from hifiprune.config.demo import DemoConfig


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
    import hifiprune as hp
    from hifiprune.cli import engine_table, tables

    facts = hp.inspect(model, deploy=deploy)
    show(facts, as_json, partial(engine_table.deployable if deploy else tables.inspected, facts))


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

    summary = demo.run(output, config)
    show(summary, as_json, lambda: tables.demonstrated(summary))
