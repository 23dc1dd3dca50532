"""Draw the report's figures with matplotlib, and write them as inline SVG in the page's colours and font."""

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from hifiprune.results import Estimate

WIDTH, ROW = 5.0, 0.22
"""Width of a figure and height of a bar or of a line of a legend, in inches: on a phone, text keeps its size."""
LETTERS = 56
"""Letters that fit into the width of a figure."""
BLACK, GREY = "#000000", "#888888"
"""Black becomes the colour of the page's text."""


def new_axes(x: str, y: str, height: float = 3.0) -> Axes:
    """Return the axes of a new figure, of that height in inches without a legend, with titles of the axes."""
    axes = Figure(figsize=(WIDTH, height), layout="constrained").add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color=BLACK, alpha=0.15)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def figure_of(axes: Axes) -> Figure:
    """Return the figure that axes are part of."""
    assert isinstance(axes.figure, Figure)
    return axes.figure


def label(name: str, width: int = LETTERS - 8) -> str:
    """Return a name as a label: in lines of at most `width` letters, without mathematics, and never hidden."""
    lines = textwrap.fill(name, width).replace("$", r"\$")
    return f"\u200b{lines}" if lines.startswith("_") else lines  # matplotlib leaves out what begins with a line


def add_legend(axes: Axes) -> None:
    """Put a legend above the axes, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, LETTERS // (8 + max(len(line) for text in labels for line in text.split("\n"))))
    figure, lines = figure_of(axes), sum(text.count("\n") + 1 for text in labels)
    figure.set_figheight(figure.get_figheight() + ROW * -(-lines // columns))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers beside it."""
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return how far the intervals of estimates reach below and above their values; no way where there is none."""
    below = [0.0 if one.low is None else one.value - one.low for one in estimates]
    above = [0.0 if one.high is None else one.high - one.value for one in estimates]
    return [below, above]


def draw_bars(axes: Axes, rows: Sequence[str], series: Mapping[str, Sequence[Estimate]]) -> None:
    """Draw horizontal bars of one thickness with their intervals: a group per row, in it a bar per series."""
    thickness = 0.8 / len(series)
    for number, (name, estimates) in enumerate(series.items()):
        places = [row - 0.4 + thickness * (number + 0.5) for row in range(len(rows))]
        values = [estimate.value for estimate in estimates]
        axes.barh(places, values, 0.9 * thickness, xerr=error_bars(estimates), ecolor=GREY, label=label(name))
    _name_rows(axes, rows, len(series))
    if len(series) > 1:
        add_legend(axes)


def draw_stacks(axes: Axes, rows: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Draw a horizontal bar per row, made of its parts."""
    lefts = [0.0] * len(rows)
    for name, values in parts.items():
        axes.barh(range(len(rows)), values, 0.8, left=lefts, label=label(name))
        lefts = [left + value for left, value in zip(lefts, values, strict=True)]
    _name_rows(axes, rows, 1)
    add_legend(axes)


def _name_rows(axes: Axes, rows: Sequence[str], bars: int) -> None:
    """Name the rows of a bar chart, from the top down, and make room for that many bars in each."""
    axes.set_yticks(range(len(rows)), [label(row, 20) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    figure_of(axes).set_figheight(0.8 + len(rows) * max(0.4, ROW * bars / 0.8))


def draw_heat(
    axes: Axes, table: Sequence[Sequence[float]], rows: Sequence[str], limits: tuple[float, float] | None = None
) -> None:
    """Draw a table of numbers as colours, with the names of its rows, and the scale between the limits beside it."""
    low, high = limits or (None, None)
    colours = axes.imshow(table, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure_of(axes).colorbar(colours, ax=axes)


def write_shares(axes: Axes, table: Sequence[Sequence[float]], columns: Sequence[str], size: float) -> None:
    """Write shares into a table of colours, and the names of its columns below it."""
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    for row, shares in enumerate(table):
        for column, share in enumerate(shares):
            written = "" if share != share else f"{share:.2f}"  # noqa: PLR0124 - not a number
            axes.text(
                column, row, written, ha="center", va="center", fontsize=size, color="#111111" if share > 0.5 else "w"
            )


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG to be put into a page, where its name is unique; the same figure gives the same text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks: the page's fonts have them
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(BLACK, "currentColor")
    return re.sub(r'<g id="[^"]*">', "<g>", svg)  # names that all figures share
