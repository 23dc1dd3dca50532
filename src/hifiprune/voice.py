"""What a run tells its user: remarks and progress on standard error, or nothing."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Voice:
    """Speaks through a rich console; without one it is silent, as the Python API is by default."""

    def __init__(self, console: Console | None = None):
        self.console = console

    def say(self, remark: str) -> None:
        """One remark on a line of its own."""
        if self.console:
            self.console.print(remark, highlight=False, soft_wrap=True, markup=False)

    def track(self, what: str) -> Callable[[Iterable[T]], Iterable[T]]:
        """A wrapper for a sequence that shows progress, time spent and time left."""

        def tracked(items: Iterable[T]) -> Iterator[T]:
            columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
            console = self.console or Console(quiet=True)
            with Progress(*columns, TimeRemainingColumn(), console=console, disable=not self.console) as progress:
                yield from progress.track(items)

        return tracked
