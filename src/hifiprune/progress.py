"""What a run tells its user: remarks and progress on standard error, or nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 20


def duration(seconds: float) -> str:
    """Return seconds for a reader, in a unit that leaves few digits."""
    if seconds <= 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def about(seconds: float) -> str:
    """Return an estimate of seconds for a reader, to stand within a sentence."""
    return f"about {duration(seconds)}" if seconds >= 1 else "under 1 s"


def console(**how: Any) -> Console:
    """Make the console of all messages and tables: names stay as they are, `:b:` is no picture."""
    return Console(emoji=False, **how)


def how_many(number: int | float, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one."""
    return f"{number:g} {noun}{'s' * (number != 1)}"


class Voice:
    """Speaks through a rich console; without one it is silent, as the Python API is by default."""

    def __init__(self, console: Console | None = None):
        self.console = console
        self._notes: list[str] = []

    def note(self, remark: str) -> None:
        """Keep a remark until something else is said: a run that is refused before that does not print it."""
        if self.console:
            self._notes.append(remark)

    def say(self, remark: str) -> None:
        """Print the notes that were kept, and a remark on a line of its own."""
        notes, self._notes = self._notes, []
        if self.console:
            for line in (*notes, remark):
                self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def track(self, what: str) -> Callable[[Iterable[T]], Iterable[T]]:
        """A wrapper for a sequence that shows progress and time left: a bar on a terminal, else a line now and then."""

        def spoken(items: Iterable[T]) -> Iterator[T]:
            total, start = length_hint(items), time.monotonic()
            said = start
            for done, item in enumerate(items):
                now = time.monotonic()
                if now - said > SECONDS_BETWEEN_LINES:
                    left = f" of {total}, {about((now - start) / done * (total - done))} left" if total else ""
                    self.say(f"{what}: {done}{left}")
                    said = now
                yield item

        def tracked(items: Iterable[T]) -> Iterator[T]:
            columns = (
                TextColumn(what, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
            )
            shown = self.console or console(quiet=True)
            with Progress(*columns, TimeRemainingColumn(), console=shown, disable=not self.console) as progress:
                yield from progress.track(items)

        return spoken if self.console and not self.console.is_terminal else tracked


SILENT = Voice()
