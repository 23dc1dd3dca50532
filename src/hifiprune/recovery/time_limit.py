"""The wall-clock limit of a whole run."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import length_hint
from typing import TypeVar

from hifiprune.io.distributed import processes
from hifiprune.progress import how_many

T = TypeVar("T")


class OutOfTimeError(Exception):
    """The limit passed before anything was trained."""


@dataclass
class TimeLimit:
    """The limit of a run, which starts where this is made.

    Attributes:
        minutes: limit; None for none.
        before: seconds that the run took before it was interrupted.
        writing: seconds that its end will take.
        start: when it began, or went on.
    """

    minutes: float | None = None
    before: float = 0.0
    writing: float = 0.0
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of the run so far, those before an interruption included."""
        return self.before + time.monotonic() - self.start

    @property
    def passed(self) -> str:
        """Return the message for a run that the limit ended too early."""
        limit = how_many(self.minutes or 0, "minute")
        return f"the time limit of {limit} passed before the first step, so give a larger --max-minutes"

    @property
    def left(self) -> float:
        """Seconds until the end must be written; infinite without a limit."""
        return math.inf if self.minutes is None else 60 * self.minutes - self.writing - self.spent

    def check(self) -> None:
        """Raise `OutOfTimeError` if no time is left, in runs of one process: several must agree on it."""
        if self.left <= 0 and processes() == 1:
            raise OutOfTimeError

    def within(self, items: Iterable[T]) -> Iterable[T]:
        """Return the items, of which the one that there is no time left for raises `OutOfTimeError`."""
        return items if self.minutes is None else _Within(items, self)


@dataclass(frozen=True)
class _Within(Iterable[T]):
    items: Iterable[T]
    limit: TimeLimit

    def __iter__(self) -> Iterator[T]:
        for item in self.items:
            self.limit.check()
            yield item

    def __length_hint__(self) -> int:
        return length_hint(self.items)
