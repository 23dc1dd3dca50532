"""Format numbers, estimates and names for output."""

from collections.abc import Collection
from pathlib import Path

from hifiprune.results import Accuracy, Estimate, Timing
from hifiprune.study_results import Correlation

LEAST_PROMISE = 1.02
"""Theoretical speed-up below which a share of it is not reported."""


def megabytes(count: int | float) -> str:
    """Format bytes as megabytes."""
    return f"{count / 1e6:,.1f} MB"


def format_interval(estimate: Estimate | Correlation, form: str = ".3g") -> str:
    """Format an estimate with its interval in brackets."""
    if estimate.value is None:
        return "none"
    bounds = "" if estimate.low is None else f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return f"{estimate.value:{form}}{bounds}"


def format_accuracy(accuracy: Accuracy) -> str:
    """Format an accuracy with its standard error."""
    error = accuracy.standard_error
    return f"{accuracy.value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def format_items(items: dict[str, tuple[int, int]], task: str) -> str:
    """Format the number of items of a task that were used, and of how many; empty for a group."""
    if task not in items:
        return ""
    asked, there = items[task]
    return f"{asked:,} of {there:,}" if asked != there else str(asked)


def format_speedup(timing: Timing) -> tuple[str, str]:
    """Format a speed-up with its range over the rounds, and its share of the theoretical saving.

    Both are withheld if the rounds cannot distinguish the speed-up from noise, the share also if the saving is tiny.
    """
    speedup = timing.speedup
    varied = speedup.low < speedup.high and not speedup.low <= 1 <= speedup.high
    if not (varied if timing.told_apart is None else timing.told_apart):
        return "not significant", ""
    share = timing.share if speedup.median > 1 and timing.promised > LEAST_PROMISE else None
    return f"{speedup.median:.2f}, {speedup.low:.2f} to {speedup.high:.2f}", "" if share is None else f"{share:.0%}"


def short_names(names: Collection[str]) -> list[str]:
    """Return the last part of each path if these are unique, else the whole paths."""
    ends = [Path(name).name for name in names]
    return ends if len(set(ends)) == len(ends) else list(names)


def width_range(widths: int | list[int]) -> str:
    """Format one width, or the range from the narrowest to the widest."""
    ends = [widths] if isinstance(widths, int) else sorted({min(widths), max(widths)})
    return " to ".join(f"{width:,}" for width in ends)


def repaired(repair: str) -> str:
    """Say what a repair did."""
    done = {"ridge": "output projections refitted", "local": "output projections refitted and every block trained"}
    return done.get(repair, "as cut")
