"""Messages and progress of a run: a logger, and one `track` for progress bars.

The library is quiet by default. `logging.basicConfig(level=logging.INFO)` shows its messages to a Python user; `shown`
prints them to a console, with progress bars where that is a terminal. Of several processes only the first one speaks.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 20


def is_first_process() -> bool:
    """Return whether this is the process that speaks, by what launchers such as `torchrun` tell each of several."""
    return os.environ.get("RANK", "0") == "0"


logger = logging.getLogger("hifiprune")
logger.addHandler(logging.NullHandler())
logger.addFilter(lambda record: is_first_process())


@dataclass
class Display:
    """State of the progress display.

    Attributes:
        console: console of messages and bars; None if only a logger gets them.
        label: label that replaces that of `track`.
        busy: whether a sequence is being tracked; inner ones are not shown.
    """

    console: "Console | None" = None
    label: str = ""
    busy: bool = False


_display = Display()


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    if seconds <= 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def about(seconds: float) -> str:
    """Format an estimate of seconds for use within a sentence."""
    return f"about {duration(seconds)}" if seconds >= 1 else "under 1 s"


def console(**how: Any) -> "Console":
    """Create the console for messages and tables, without emoji codes."""
    from rich.console import Console  # which `--help` of all commands does without

    return Console(emoji=False, **how)


def how_many(number: int | float, noun: str) -> str:
    """Format a number with its noun, in the plural unless it is one."""
    return f"{number:g} {noun}{'s' * (number != 1)}"


def note(message: str) -> None:
    """Log a message that a console holds back until another one follows: a run that is refused does not print it."""
    logger.info(message, extra={"held_back": True})


class ConsoleHandler(logging.Handler):
    """Prints each message on a line of its own, and notes with the message that follows them."""

    def __init__(self, console: "Console"):
        super().__init__()
        self.console = console
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message, after the notes that wait for one; details of `--verbose` are none."""
        message = record.getMessage()
        if getattr(record, "held_back", False):
            self.notes.append(message)
            return
        notes: list[str] = []
        if record.levelno >= logging.INFO:
            notes, self.notes = self.notes, notes
        for line in (*notes, message):
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def shown(console: "Console", level: int = logging.INFO) -> Iterator[None]:
    """Show messages of a level and above on a console, and progress from `logging.INFO` on; afterwards as before."""
    handler, before = ConsoleHandler(console), (_display.console, logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(level)
    _display.console, logger.propagate = console, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        _display.console, _, logger.propagate = before
        logger.setLevel(before[1])


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Have whatever `track` shows within be called `label`."""
    before, _display.label = _display.label, label
    try:
        yield
    finally:
        _display.label = before


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield the items, and show how many are done: by a bar on a terminal, else by a message now and then.

    Nothing is shown where messages of `logging.INFO` are not, and within another tracked sequence.

    Args:
        items: sequence to go through; with a length, the time left is shown too.
        what: name of the work, unless it is done `labelled`.
    """
    if _display.busy or not (logger.isEnabledFor(logging.INFO) and is_first_process()):
        yield from items
        return
    what, console = _display.label or what, _display.console
    _display.busy = True
    try:
        yield from _with_bar(items, what, console) if console and console.is_terminal else _with_lines(items, what)
    finally:
        _display.busy = False


def _with_bar(items: Iterable[T], what: str, console: "Console") -> Iterator[T]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(items)


def _with_lines(items: Iterable[T], what: str) -> Iterator[T]:
    total, start = length_hint(items), time.monotonic()
    said = start
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > SECONDS_BETWEEN_LINES:
            left = f", {about((now - start) / done * (total - done))} left" if done else ""
            logger.info(f"{what}: {done} of {total}{left}" if total else f"{what}: {done}")
            said = now
        yield item
