"""Conversations as text, by the tokenizer's chat template, which runs in a process of its own with limits.

A template is a program that comes with a checkpoint. jinja's sandbox keeps it from the machine, but not from computing
for ever or filling the memory, as `{{ 10**(10**8) }}` does, and a computation inside C can be ended from outside only.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.io.text_sources import check_text

if sys.platform != "win32":
    import resource

SECONDS = 20.0
"""Time that writing one conversation may take."""
MEMORY = 1 << 30
"""Bytes that templates may take, all in all."""
COPIED = sys.platform == "linux"
"""Whether the process starts as a copy of this one: macOS breaks copies of processes with threads."""
LONGEST = 64 << 20
"""Characters that a template may write of one conversation."""


Writing = Callable[[Sequence[dict[str, Any]], PreTrainedTokenizerBase], Iterator[list[tuple[str, bool]]]]
"""Makes texts of a conversation, in pieces with whether each is learned: `write` or `cue`."""


@dataclass(frozen=True)
class Piece:
    """A part of an example's text.

    Attributes:
        text: characters of the part.
        learned: whether they are a label.
    """

    text: str
    learned: bool


class ChatTemplate:
    """A tokenizer's chat template in a process of its own, which starts with the first conversation.

    The process works ahead: what several conversations come to is asked for at once, and taken one by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seconds: float = SECONDS, writing: Writing | None = None):
        self._tokenizer, self._seconds, self._asked, self._writing = tokenizer, seconds, 0, writing or write
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> "ChatTemplate":
        """Return this; its process ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        if self._process:
            assert self._connection
            self._process.kill()
            self._process.join()
            self._connection.close()

    @property
    def is_there(self) -> bool:
        """Return whether the tokenizer has a template."""
        return self._tokenizer.chat_template is not None

    def ask(self, conversations: Sequence[Any]) -> None:
        """Have conversations written that `texts` will be asked for next, in this order."""
        wanted = [messages for messages in conversations if is_conversation(messages)]
        if not self.is_there or not wanted:
            return
        connection = self._connection or self._start()
        try:
            connection.send(wanted)
        except RecursionError as error:
            raise UserError("a conversation is nested too deeply") from error
        self._asked += len(wanted)

    def texts(self, messages: Any) -> list[list[Piece]]:
        """Return a conversation as text in pieces, as `write` or `cue` makes them.

        Raises:
            UserError: the conversation is none, or the template refuses it, fails, or goes beyond a limit.
        """
        if not self.is_there:
            raise UserError("it is a conversation, but the tokenizer has no chat template")
        if not is_conversation(messages):
            raise UserError("'messages' must be a list of turns, each with 'role' and 'content'")
        if not self._asked:
            self.ask([messages])
        self._asked -= 1
        connection = self._connection
        assert connection
        try:
            if not connection.poll(self._seconds):
                raise UserError(f"the tokenizer's chat template takes more than {self._seconds:g} s for it: repair it")
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise UserError("the tokenizer's chat template broke the process that it ran in: repair it") from error
        if isinstance(answer, str):
            raise UserError(answer)
        return [[Piece(check_text(text), learned) for text, learned in pieces] for pieces in answer]

    def _start(self) -> Connection:
        """Start the process, and wait until it has imported what it needs, which counts for no conversation."""
        context: Any = multiprocessing.get_context("fork" if COPIED else "spawn")
        self._connection, theirs = context.Pipe()
        served = (theirs, self._connection, self._tokenizer, self._writing)
        self._process = context.Process(target=_serve, args=served, daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                "the process of the tokenizer's chat template did not start; does the program that uses hifiprune "
                "start under `if __name__ == '__main__':`?"
            ) from error
        return self._connection


def is_conversation(messages: Any) -> bool:
    """Return whether it is a list of turns, each with a role."""
    return isinstance(messages, Sequence) and all(isinstance(turn, dict) and "role" in turn for turn in messages)


def write(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[tuple[str, bool]]]:
    """Yield a conversation as the tokenizer's own template writes it: texts, and whether each is learned.

    What the template writes after an assistant's cue is learned. Where it writes earlier turns otherwise once a later
    one comes, a new text starts, all over.

    Raises:
        UserError: the template fails, writes too much, or cues the assistant otherwise than it answers.
    """
    pieces: list[tuple[str, bool]] = []
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        cue = _applied(messages[:number], tokenizer, cue=True)
        whole = _applied(messages[: number + 1], tokenizer, cue=False)
        if not whole.startswith(cue):
            raise UserError("the chat template cues the assistant otherwise than it answers; give prompt and response")
        if not cue.startswith(written):
            yield pieces
            pieces, written = [], ""
        pieces += [(cue[len(written) :], False), (whole[len(cue) :], True)]
        written = whole
    if pieces:
        yield pieces


def cue(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[tuple[str, bool]]]:
    """Yield a conversation up to where the assistant answers, as the tokenizer's own template writes it."""
    yield [(_applied(messages, tokenizer, cue=True), False)]


def _applied(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, cue: bool) -> str:
    try:
        text = str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=cue))
    except Exception as error:  # whatever the program that the template is does
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise UserError(f"the tokenizer's chat template refuses the conversation: {reason}") from error
    if len(text) > LONGEST:
        raise UserError(
            f"the tokenizer's chat template writes {len(text):,} characters of it; at most {LONGEST:,} are read"
        )
    return text


def _serve(connection: Connection, other: Connection, tokenizer: PreTrainedTokenizerBase, writing: Writing) -> None:
    """Answer conversations by their texts, or by a message, until the other end is closed."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit_memory()
    connection.send("ready")
    while True:
        try:
            conversations = connection.recv()
        except (EOFError, OSError):
            return
        for messages in conversations:
            _limit_time()
            try:
                answer: Any = list(writing(messages, tokenizer))
            except UserError as error:
                answer = str(error)
            connection.send(answer)


def _limit_memory() -> None:
    """Let this process take `MEMORY` bytes more, where the system can limit it."""
    statm = Path("/proc/self/statm")
    if sys.platform != "win32" and statm.exists():
        taken = int(statm.read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = taken + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most < 0 else min(wanted, most), most))


def _limit_time() -> None:
    """Let the system end this process if it goes on computing after the one that asks is gone."""
    if sys.platform != "win32":
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        wanted = int(used.ru_utime + used.ru_stime + 2 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (wanted if most < 0 else min(wanted, most), most))
