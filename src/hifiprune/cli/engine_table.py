"""What `inspect --deploy` found, as a table."""

from itertools import groupby
from typing import Any

from rich.table import Table

from hifiprune.commands.next_steps import cut_flags, is_there, next_is_pruning, next_step
from hifiprune.deployment.engines import K_BLOCK
from hifiprune.formatting import width_range
from hifiprune.progress import console


def deployable(facts: dict[str, Any]) -> None:
    """A row for each engine and format."""
    title = f"{facts['architecture']}, MLP width {width_range(facts['neurons_per_mlp'])}"
    table = Table("engine", "format", "takes it", "GPUs", "why", title=title)
    for engine, rows in groupby(facts["deployment"], lambda row: f"{row['engine']} {row['version']}"):
        answers = [*rows]
        if len({row["why"] for row in answers}) == 1 and answers[0]["verdict"] in ("no", "unknown"):
            answers = [answers[0] | {"form": "any"}]
        for row in answers:
            sizes = ", ".join(map(str, row["tensor_parallel"]))
            table.add_row(engine if row is answers[0] else "", row["form"], row["verdict"], sizes, row["why"])
    console().print(table)
    said = (
        "As their source says in the versions named; nothing was run. GPUs: numbers of them that can share each layer, "
        f"by the width and {facts['heads']} attention heads. With --json the addresses of what was read."
    )
    console().print(said, markup=False, soft_wrap=True, highlight=False)
    _what_next(facts)


def _what_next(facts: dict[str, Any]) -> None:
    """Widths that more engines take, where there are any; else to the hub."""
    widths, dense = facts["neurons_per_mlp"], facts["pruned_from"]
    if not dense:
        next_is_pruning(facts["model"])
    elif not is_there(dense):
        next_step("push", facts["model"], "OWNER/NAME")
    elif isinstance(widths, list):
        next_is_pruning(dense, more=("--allocation", "uniform"))
    elif widths % K_BLOCK and cut_flags(dense, roundings=(K_BLOCK,)):
        next_is_pruning(dense, round_to=K_BLOCK)
    else:
        next_step("push", facts["model"], "OWNER/NAME")
