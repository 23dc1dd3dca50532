"""`report`: read the folders of runs, write one self-contained page."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.json_files import to_plain
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.reports.report_sections import sections_of
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
        UserError: a folder is not one of a run.
    """
    runs = read_runs([local_path(folder) for folder in folders])
    target = check_target(output, folder=False, overwrite=overwrite, inputs=[*folders])
    sections = sections_of(runs)
    tokens = [token for section in sections for _, texts in section.passages for text in texts for token in text]
    template = Environment(autoescape=True).from_string(
        (files("hifiprune.reports") / "report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=_title(runs),
        subtitle=f"{len(runs)} runs of hifiprune {__version__}: {', '.join(run.name for run in runs)}",
        version=__version__,
        sections=sections,
        tokens=[to_plain(token) for token in tokens if token.dense],
    )
    with replacing(target, overwrite=overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _title(runs: list[Run]) -> str:
    """Return the names of the checkpoints that were made, and of what from."""
    made = [run.name for run in runs if run.made]
    dense = {Path(run.made.arguments.model).name for run in runs if run.made}
    if not dense:
        return "Measured by hifiprune"
    return f"{' and '.join(made) or 'Checkpoints'}, pruned from {', '.join(sorted(dense))}"
