"""Messages and progress: quiet in the library, the same words on every kind of output, and one process speaks."""

import io
import logging
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from rich.console import Console

from hifiprune import progress
from hifiprune.progress import labelled, logger, note, shown, track
from hifiprune.run_record import RunRecord


class Seconds:
    """A clock that every look puts forward."""

    def __init__(self, pace: float):
        self.now, self.pace = 0.0, pace

    def monotonic(self) -> float:
        self.now += self.pace
        return self.now


def console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return progress.console(file=out, width=80, force_terminal=terminal, color_system=None), out


def test_the_library_says_nothing_unless_it_is_asked_to(capfd: pytest.CaptureFixture[str]) -> None:
    with patch.object(progress, "time", Seconds(30)):
        assert list(track(range(5), "counting")) == [0, 1, 2, 3, 4]
    logger.warning("damaged")
    note("by the way")
    assert "".join(capfd.readouterr()) == ""


def test_a_python_user_gets_messages_by_the_standard_library(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hifiprune"), patch.object(progress, "time", Seconds(15)):
        note("by the way")
        assert list(track(range(4), "counting")) == [0, 1, 2, 3]
    assert caplog.messages == ["by the way", "counting: 1 of 4, about 90 s left", "counting: 3 of 4, about 20 s left"]


def test_notes_wait_for_the_next_message_and_go_with_a_refusal() -> None:
    to, out = console()
    with shown(to, logging.DEBUG):
        note("one")
        logger.debug("a detail")
        assert out.getvalue() == "a detail\n"
        logger.info("[b]two[/b] :bug:")
        assert out.getvalue() == "a detail\none\n[b]two[/b] :bug:\n", "words stay as they are"
        note("of a run that is refused")
    assert out.getvalue().count("\n") == 3
    logger.warning("later")
    assert out.getvalue().count("\n") == 3, "quiet again"


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(terminal: bool) -> None:
    to, out = console(terminal=terminal)
    with shown(to), patch.object(progress, "time", Seconds(21)), labelled("step 2 of 3"):
        assert list(track(range(3), "counting")) == [0, 1, 2]
        assert list(track(iter(["a", "b"]), "counting")) == ["a", "b"]
    if terminal:
        assert "step 2 of 3 ━" in out.getvalue()
        assert "3/3" in out.getvalue()
    else:
        assert out.getvalue().splitlines() == [
            "step 2 of 3: 0 of 3",
            "step 2 of 3: 1 of 3, about 84 s left",
            "step 2 of 3: 2 of 3, about 32 s left",
            "step 2 of 3: 0 of 2",
            "step 2 of 3: 1 of 2, about 42 s left",
        ]


def test_the_inner_of_two_sequences_is_not_shown() -> None:
    to, out = console()
    with shown(to), patch.object(progress, "time", Seconds(21)):
        for _ in track(range(2), "outer"):
            list(track(range(9), "inner"))
        list(track(range(2), "next"))
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == ["outer", "outer", "next", "next"]


@pytest.mark.parametrize(("level", "said"), [(logging.WARNING, "trouble\n"), (logging.INFO, "words\ntrouble\n")])
def test_a_quiet_run_shows_warnings_alone(level: int, said: str) -> None:
    for terminal in (False, True):
        to, out = console(terminal=terminal)
        with shown(to, level):
            logger.info("words")
            logger.warning("trouble")
            if level == logging.WARNING:
                list(track(range(3), "counting"))
        assert out.getvalue() == said


def test_a_verbose_run_tells_of_its_stages() -> None:
    to, out = console()
    with shown(to, logging.DEBUG), RunRecord("score", {}).stage("scoring"):
        assert out.getvalue() == "scoring ...\n"
    assert out.getvalue() == "scoring ...\nscoring: 0.0 s\n"


def test_of_several_processes_the_first_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    to, out = console()
    with shown(to), patch.object(progress, "time", Seconds(21)):
        logger.warning("trouble")
        assert list(track(range(3), "counting")) == [0, 1, 2]
    assert out.getvalue() == ""


def test_an_interrupted_sequence_leaves_no_trace() -> None:
    to, out = console()

    def interrupted() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), shown(to):
        list(track(interrupted(), "counting"))
    with shown(to), patch.object(progress, "time", Seconds(21)):
        list(track(range(2), "counting"))
    assert out.getvalue() == "counting: 0 of 2\ncounting: 1 of 2, about 42 s left\n"
