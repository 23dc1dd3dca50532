"""The table of `inspect --deploy`: a line for each engine, reasons numbered below."""

from itertools import groupby

from rich import box
from rich.table import Table

from hifiprune.commands.inspect import InspectResults
from hifiprune.commands.next_steps import cut_flags, is_there, next_is_pruning, next_step
from hifiprune.deployment.compatibility import Answer
from hifiprune.deployment.engines import FORMS, K_BLOCK
from hifiprune.formatting import width_range
from hifiprune.progress import console

SHORT = {form.name: form.short for form in FORMS}
LEGEND = (
    "From the source code of these versions; nothing was run. GPUs: possible tensor-parallel sizes for the MLP width "
    "and {} attention heads. --json adds full names of formats and the addresses of the sources."
)


def deployable(results: InspectResults) -> None:
    """Print which formats each engine supports, the reasons against the others, and what to run next."""
    rows = results.deployment or []
    reasons = {why: number for number, why in enumerate(dict.fromkeys(row.why for row in rows if row.why), 1)}
    table = Table("engine", "supported", "limits", "GPUs", box=box.SIMPLE_HEAD, pad_edge=False)
    for engine, group in groupby(rows, lambda row: f"{row.engine} {row.version}"):
        by_verdict: dict[str, list[Answer]] = {}
        for row in (answers := [*group]):
            by_verdict.setdefault(row.verdict, []).append(row)
        cells = {verdict: ", ".join(_cell(row, reasons) for row in same) for verdict, same in by_verdict.items()}
        supported = cells.pop("yes", "")
        table.add_row(
            engine, supported, "; ".join(f"{verdict}: {formats}" for verdict, formats in cells.items()), _gpus(answers)
        )
    title = f"{results.architecture}, MLP width {width_range(results.neurons_per_mlp)}"
    console().print(title, markup=False, highlight=False)
    console().print(table)
    for why, number in reasons.items():
        console().print(f"[{number}] {why}", markup=False, highlight=False)
    console().print(LEGEND.format(results.heads), markup=False, highlight=False)
    _what_next(results)


def _cell(row: Answer, reasons: dict[str, int]) -> str:
    """Return a format, with the number of its reason if there is one."""
    return SHORT[row.form] + (f" \\[{reasons[row.why]}]" if row.why else "")


def _gpus(answers: list[Answer]) -> str:
    """Return the tensor-parallel sizes of the first format, and of those that differ from it."""
    by_form = {row.form: ", ".join(map(str, row.tensor_parallel)) for row in answers if row.tensor_parallel}
    first = next(iter(by_form.values()), "")
    return "; ".join([first, *(f"{SHORT[form]}: {sizes}" for form, sizes in by_form.items() if sizes != first)])


def _what_next(results: InspectResults) -> None:
    """Suggest widths that more engines support, or else publishing."""
    widths, dense = results.neurons_per_mlp, results.pruned_from
    if not dense:
        next_is_pruning(results.model)
    elif not is_there(dense):
        next_step("push", results.model, "OWNER/NAME")
    elif isinstance(widths, list):
        next_is_pruning(dense, more=("--allocation", "uniform"))
    elif widths % K_BLOCK and cut_flags(dense, roundings=(K_BLOCK,)):
        next_is_pruning(dense, round_to=K_BLOCK)
    else:
        next_step("push", results.model, "OWNER/NAME")
