"""Format numbers, estimates and names for output."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

LEAST_PROMISE = 1.02
"""Theoretical speed-up below which a share of it is not reported."""


def megabytes(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 1e6:,.1f} MB"


def accuracies(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a model's results on each task, and on average where that is defined."""
    found: dict[str, dict[str, Any]] = row["tasks"]
    return found | ({"average": row["average"]} if "average" in row else {})


def format_interval(estimate: dict[str, Any], form: str = ".3g") -> str:
    """Format an estimate with its interval in brackets."""
    if estimate["value"] is None:
        return "none"
    bounds = "" if estimate["low"] is None else f" ({estimate['low']:{form}} to {estimate['high']:{form}})"
    return f"{estimate['value']:{form}}{bounds}"


def format_accuracy(estimate: dict[str, Any]) -> str:
    """Format an accuracy with its standard error."""
    error = estimate["standard_error"]
    return f"{estimate['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def format_items(items: dict[str, list[int]], task: str) -> str:
    """Format the number of items of a task that were used, and of how many; empty for a group."""
    asked, there = items.get(task, ("", ""))
    return f"{asked:,} of {there:,}" if asked != there else str(asked)


def format_speedup(found: dict[str, Any]) -> tuple[str, str]:
    """Format a speed-up with its range over the rounds, and its share of the theoretical saving.

    Both are withheld if the rounds cannot distinguish the speed-up from noise, the share also if the saving is tiny.
    """
    speedup = found["speedup"]
    varied = speedup["low"] < speedup["high"] and not speedup["low"] <= 1 <= speedup["high"]
    if not found.get("told_apart", varied):
        return "not significant", ""
    share = found["share"] if speedup["median"] > 1 and found["promised"] > LEAST_PROMISE else None
    told = "" if share is None else f"{share:.0%}"
    return f"{speedup['median']:.2f}, {speedup['low']:.2f} to {speedup['high']:.2f}", told


def short_names(names: Collection[str]) -> list[str]:
    """Return the last part of each path if these are unique, else the whole paths."""
    ends = [Path(name).name for name in names]
    return ends if len(set(ends)) == len(ends) else list(names)


def width_range(widths: int | list[int]) -> str:
    """Format one width, or the range from the narrowest to the widest."""
    ends = [widths] if isinstance(widths, int) else sorted({min(widths), max(widths)})
    return " to ".join(f"{width:,}" for width in ends)
