"""The story of `report`: one page that shows what runs did, with all that it needs inside."""

import base64
import gzip
import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.models.lineage import pruning_of
from hifiprune.reports.runs import Run, read_runs
from hifiprune.version import __version__


@exclusive
def report(folders: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> Path:
    """Write one page about runs: outputs of `prune`, `recover`, `evaluate`, `bench` and `compare`.

    Args:
        folders: of the runs.
        output: the HTML file to be made; it needs no network and no other file.
        overwrite: replace an existing one.

    Returns:
        where it is.

    Raises:
        UserError: a folder is not one of a run, or plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise UserError("a report needs plotly: pip install 'hifiprune[report]'")
    from plotly.offline import get_plotlyjs

    from hifiprune.reports.report_sections import sections_of

    runs = read_runs([local_path(folder) for folder in folders])
    target = check_target(output, folder=False, overwrite=overwrite, inputs=[*folders])
    sections = sections_of(runs)
    plots = {plot.id: json.loads(plot.figure.to_json()) for section in sections for plot in section.plots}
    passages = {passage["id"]: passage["texts"] for section in sections for passage in section.passages}
    data = json.dumps({"plots": plots, "passages": passages}).replace("<", "\\u003c")
    template = Environment(autoescape=True).from_string(
        (files("hifiprune.reports") / "report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=_title(runs),
        subtitle=f"{len(runs)} runs of hifiprune {__version__}: {', '.join(run.name for run in runs)}",
        version=__version__,
        sections=sections,
        data=data,
        plotly=_packed(get_plotlyjs()),
    )
    with replacing(target, overwrite=overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _packed(text: str) -> str:
    """Return text compressed by gzip, in base64; the same text gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _title(runs: list[Run]) -> str:
    """Return the names of the checkpoints that were made, and of what from."""
    made = [run.name for run in runs if run.made]
    dense = {Path(pruning["arguments"]["model"]).name for run in runs if (pruning := pruning_of(run.facts))}
    if not dense:
        return "Measured by hifiprune"
    return f"{' and '.join(made) or 'Checkpoints'}, pruned from {', '.join(sorted(dense))}"
