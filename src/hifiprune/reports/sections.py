"""Sections of the report: texts, tables, and plots, each with alternative text and a table of its values."""

from dataclasses import dataclass, field

from matplotlib.axes import Axes

from hifiprune.reports.figures import figure_of, inline_svg
from hifiprune.results import Token

Rows = list[list[str]]


@dataclass(frozen=True)
class Plot:
    """A plot with its description and its values.

    Attributes:
        id: unique name.
        alt: description in words.
        axes: of its figure.
        table: values, the names of the columns first.
    """

    id: str
    alt: str
    axes: Axes
    table: Rows

    @property
    def svg(self) -> str:
        """Return the figure as part of a page."""
        return inline_svg(figure_of(self.axes), self.id)


@dataclass
class Section:
    """A section of the page."""

    title: str
    texts: list[str] = field(default_factory=list)
    table: Rows | None = None
    plots: list[Plot] = field(default_factory=list)
    passages: list[tuple[str, list[list[Token]]]] = field(default_factory=list)
    records: list[tuple[str, str]] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        """Return whether the section has content."""
        return bool((self.table and self.table[1:]) or self.plots or self.passages or self.records)


def new_plot(id_: str, alt: str, axes: Axes, table: Rows) -> Plot:
    """Return a plot whose name has no spaces, and whose description begins with a capital letter."""
    return Plot(id_.replace(" ", "-"), alt[0].upper() + alt[1:], axes, table)
