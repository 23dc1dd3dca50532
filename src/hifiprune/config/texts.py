"""Options for the texts that commands read: to calibrate on, and held-out ones to measure on."""

import re
from dataclasses import dataclass, replace

from hifiprune.bounds import COUNT, PAIR, SEED
from hifiprune.config.options import CALIBRATION, TEXT, Checked, option
from hifiprune.errors import UserError
from hifiprune.io.text_sources import SELF, check_named

SAMPLERS = ("auto", "documents", "stream")
RECOMMENDED = ("HuggingFaceFW/fineweb-edu:sample-10BT", "allenai/c4:en")
"""General text of the hub, in equal parts, for models without a use of their own."""
MOST_TOKENS = 2**32
"""Largest number of tokens of all windows; papers use some hundred thousand."""


def mixture(words: list[str]) -> dict[str, object]:
    """Return the first source, and the others with their shares: of `a` and `b:0.3`, `a` and `(("b", 0.3),)`.

    Sources without a share get equal parts of the rest; where all have one, their shares are relative.

    Raises:
        UserError: the shares leave nothing for a source.
    """
    matches = [re.fullmatch(r"(.+):(\d*\.?\d+)", word) for word in words]
    sources = [match[1] if match else word for word, match in zip(words, matches, strict=True)]
    given = [float(match[2]) if match else None for match in matches]
    total = sum(share for share in given if share is not None)
    if None not in given and total > 0:
        shares = [share / total for share in given if share is not None]
    elif total < 1:
        shares = [(1 - total) / given.count(None) if share is None else share for share in given]
    else:
        raise UserError(f"the shares of --calibration add up to {total:g} and leave nothing for the others")
    return {"source": sources[0], "mixed": tuple(zip(sources[1:], shares[1:], strict=True))}


@dataclass(frozen=True)
class Calibration(Checked):
    """Which text the model is shown, and how windows are drawn from it.

    The papers draw from documents, without a start token. `mixed` has further sources with the share of the windows
    that each gets; `source` gets the rest.
    """

    source: str = option(
        help="Calibration text: a .txt, .jsonl, .csv or .parquet file (also .gz, .bz2, .xz, .zst), a folder of these, "
        "'-' for standard input, a hub data set id[:config][:split], 'python-docs' (ships with Python) or 'self' "
        "(sampled from the model). Repeat it to mix sources; SOURCE:0.3 gets 30% of the windows. Recommended: text "
        f"like that of the model's use, or {' with '.join(RECOMMENDED)}.",
        flag="--calibration",
        metavar="SOURCE",
        words=mixture,
    )
    num_samples: int = option(128, "Number of calibration windows.", panel=CALIBRATION, bounds=COUNT)
    seq_len: int = option(1024, "Tokens per window.", panel=CALIBRATION, bounds=PAIR)
    seed: int = option(0, "Seed of everything that is drawn at random.", panel=CALIBRATION, bounds=SEED)
    sampler: str = option(
        "auto",
        "documents: a random window of each long document; stream: windows of all documents joined; auto: stream for "
        "a single document.",
        panel=CALIBRATION,
        choices=SAMPLERS,
    )
    text_column: str | None = option(
        None, "Column that holds the text.", panel=CALIBRATION, shown_default="guessed from the data"
    )
    mixed: tuple[tuple[str, float], ...] = option((), "Further sources with their shares.", in_files_only=True)
    bos: bool = option(
        True,
        "Begin every window with what the tokenizer writes before a text, such as a start token, where it does.",
        in_files_only=True,
    )
    prompts: str | None = option(
        None,
        "Prompts that the model answers, with --calibration self: a text with one a line, or rows as 'recover' takes "
        "them, whose answers are not read; written by the chat template, if the tokenizer has one.",
        panel=CALIBRATION,
        metavar="SOURCE",
    )

    def __post_init__(self) -> None:
        """Check the sizes, the names of sources and their shares."""
        super().__post_init__()
        if self.num_samples * self.seq_len > MOST_TOKENS:
            raise UserError(
                f"num-samples {self.num_samples} of seq-len {self.seq_len} are {self.num_samples * self.seq_len:.3g} "
                f"tokens, more than the {MOST_TOKENS:.3g} that are taken; use fewer"
            )
        for source in (*self._sources, *self.texts):
            check_named(source)
        if self.prompts is not None and not self.is_sampled:
            raise UserError(f"--prompts are answered by the model, which --calibration {SELF} asks for; leave them out")
        for source, share in self.mixed:
            if not 0 < share < 1:
                raise UserError(f"the share {share:g} of {source} must lie in (0, 1)")
        if min(self._counts) < 1:
            raise UserError(
                f"num-samples {self.num_samples} leaves a source without a window; use more or larger shares"
            )

    @property
    def is_sampled(self) -> bool:
        """Return whether text is sampled from the model itself, all of it or a part."""
        return SELF in self._sources

    @property
    def texts(self) -> list[str]:
        """Return the sources that are read, not sampled, and that of the prompts."""
        read = [source for source in self._sources if source != SELF]
        return read if self.prompts is None else [*read, self.prompts]

    @property
    def _sources(self) -> list[str]:
        """Return all sources."""
        return [self.source, *(source for source, _ in self.mixed)]

    @property
    def _counts(self) -> list[int]:
        """Return the number of windows of each source."""
        further = [round(share * self.num_samples) for _, share in self.mixed]
        return [self.num_samples - sum(further), *further]

    @property
    def parts(self) -> list["Calibration"]:
        """Return the calibration of each source by itself, with its number of windows."""
        return [
            replace(self, source=source, num_samples=count, mixed=(), prompts=self.prompts if source == SELF else None)
            for source, count in zip(self._sources, self._counts, strict=True)
        ]


@dataclass(frozen=True)
class Text(Checked):
    """A held-out text to evaluate on."""

    source: str = option(
        help="Held-out text to measure on: a .txt, .jsonl, .csv or .parquet file, a folder of these, '-' for standard "
        "input, a hub data set id[:config][:split], or 'python-docs' (ships with Python).",
        flag="--text",
        metavar="SOURCE",
    )
    seq_len: int = option(1024, "Tokens per window.", panel=TEXT, bounds=PAIR)
    max_windows: int | None = option(
        None, "Measure on the first windows only.", panel=TEXT, bounds=COUNT, shown_default="all"
    )
    fidelity: bool = option(True, "Measure every metric, not only perplexity and entropy.", in_files_only=True)
    text_column: str | None = option(
        None, "Column that holds the text.", panel=TEXT, shown_default="guessed from the data"
    )

    def __post_init__(self) -> None:
        """Check the numbers and the name of the source."""
        check_named(self.source)
        super().__post_init__()
