"""Ranges of numeric options."""

import re
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from hifiprune.errors import UserError

LARGEST = 2**31 - 1
SEEDS = 2**32
"""So many seeds there are that every generator of random numbers takes."""


@dataclass(frozen=True)
class Bounds:
    """Range of a numeric option.

    Attributes:
        least: lower bound.
        most: upper bound.
        whole: whether values must be integers.
        open: whether the bounds themselves are excluded.
    """

    least: int | float
    most: int | float
    whole: bool = False
    open: bool = False

    def __contains__(self, value: Any) -> bool:
        """Return whether a number is in range."""
        inside = self.least < value < self.most if self.open else self.least <= value <= self.most
        return inside and isfinite(value)

    def wanted(self, value: Any) -> str:
        """Describe the range to a user whose number is outside it."""
        if self.most == SEEDS - 1:
            return f"lie in {self.least} to {self.most}"
        if self.most == inf and not isfinite(value):
            return "be a finite number"
        if self.most == 1:
            return "lie in (0, 1)" if self.open else "lie in [0, 1]"
        if value > self.least and isfinite(value):
            return f"be at most {self.most}"
        return f"be above {self.least:g}" if self.open else f"be at least {self.least}"


SHARE, INNER_SHARE = Bounds(0, 1), Bounds(0, 1, open=True)
POSITIVE, NOT_NEGATIVE = Bounds(0, inf, open=True), Bounds(0, inf)
COUNT, PAIR = Bounds(1, LARGEST, whole=True), Bounds(2, LARGEST, whole=True)
NOT_NEGATIVE_COUNT = Bounds(0, LARGEST, whole=True)
FEW, SEED = Bounds(1, 1000, whole=True), Bounds(0, SEEDS - 1, whole=True)


def check_number(option: str, value: Any, bounds: Bounds) -> None:
    """Refuse a number that is out of range.

    Raises:
        UserError: it is, or is no number.
    """
    kind: Any = Integral if bounds.whole else Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{option} {value!r} must be a {'whole ' * bounds.whole}number{meant(str(value))}")
    if value not in bounds:
        shown = f"{value}" if bounds.whole else f"{value:g}"
        raise UserError(f"{option} {shown} must {bounds.wanted(value)}{_as_share(bounds, value)}")


def _as_share(bounds: Bounds, value: int | float) -> str:
    """Suggest the fraction for a percentage, or for what is left of the whole."""
    if bounds is not INNER_SHARE or not 1 < value < 100:
        return ""
    return f"; did you mean {value - 1 if value < 2 else value / 100:g}?"


def meant(text: str) -> str:
    """Suggest how to write a number that was written as people do: `0,2`, `20%`, `1/5` or `1,000`."""
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", text):
        return f"; write {text.replace(',', '')}"
    if re.fullmatch(r"[+-]?\d*,\d+", text):
        return f"; write {float(text.replace(',', '.')):g}"
    if match := re.fullmatch(r"(\d*\.?\d+) ?%", text):
        return f"; write {float(match[1]) / 100:g}"
    if (match := re.fullmatch(r"(\d+)/(\d+)", text)) and int(match[2]):
        return f"; write {int(match[1]) / int(match[2]):g}"
    return ""


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""As transformers counts them."""


def size_in_bytes(option: str, size: str) -> int:
    """Return the bytes of a size such as 500MB.

    Raises:
        UserError: it is not a number and a unit.
    """
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB|TB)", size)
    if not match:
        raise UserError(f"{option} '{size}' must be a number and a unit, such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2]]
