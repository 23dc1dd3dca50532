"""Held-out texts to measure on."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.bounds import check_numbers
from hifiprune.calibration import cut_windows, join_documents, window_start
from hifiprune.errors import UserError
from hifiprune.io.text_sources import check_named, read_documents


@dataclass(frozen=True)
class Text:
    """A held-out text to evaluate on.

    Attributes:
        source: any calibration source except `self`.
        seq_len: tokens per window.
        max_windows: maximum number of windows, from the start of the text.
        fidelity: measure every metric; otherwise only perplexity and entropy, in less time.
        text_column: column of the text, guessed if not given.

    Raises:
        UserError: a number is out of range.
    """

    source: str
    seq_len: int = 1024
    max_windows: int | None = None
    fidelity: bool = True
    text_column: str | None = None

    def __post_init__(self) -> None:
        check_named(self.source)
        check_numbers(vars(self))

    def held(self, tokenizer: PreTrainedTokenizerBase) -> "Held":
        """Tokenize the text as one stream and cut it without overlap; no more is read than is used.

        Every window begins with the special tokens that the tokenizer puts before a text, and has that many fewer
        tokens of the text. All text tokens are predicted, except the first one of a window without special tokens.

        Raises:
            UserError: there is no text, or too little of it.
        """
        start = window_start(tokenizer, seq_len=self.seq_len)
        most = self.max_windows and self.max_windows * (self.seq_len + len(start))  # a document may begin at a cut
        stream = join_documents(read_documents(self.source, self.text_column), tokenizer, most)
        windows = cut_windows(stream[len(start) :], self.seq_len, start)[: self.max_windows]
        if len(windows) == 0:
            raise UserError(
                f"too little text in {self.source}: its {len(stream)} tokens make no window of {self.seq_len}; "
                f"use more text or --seq-len {max(2, len(stream))}"
            )
        return Held(self.source, self.fidelity, windows)


@dataclass(frozen=True)
class Held:
    """The windows of a text."""

    source: str
    fidelity: bool
    windows: Int[Tensor, "windows positions"]
