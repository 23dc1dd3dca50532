"""Held-out texts to measure on."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.calibration import cut_windows, join_documents, window_start
from hifiprune.config.texts import Text
from hifiprune.errors import UserError
from hifiprune.io.text_sources import read_documents


@dataclass(frozen=True)
class Held:
    """The windows of a text."""

    source: str
    fidelity: bool
    windows: Int[Tensor, "windows positions"]


def held_windows(text: Text, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "windows positions"]:
    """Tokenize a held-out text as one stream and cut it without overlap; no more is read than is used.

    Every window begins with the special tokens that the tokenizer puts before a text, and has that many fewer
    tokens of the text. All text tokens are predicted, except the first one of a window without special tokens.

    Raises:
        UserError: there is no text, or too little of it.
    """
    start = window_start(tokenizer, seq_len=text.seq_len)
    most = text.max_windows and text.max_windows * (text.seq_len + len(start))  # a document may begin at a cut
    stream = join_documents(read_documents(text.source, text.text_column), tokenizer, most)
    windows = cut_windows(stream[len(start) :], text.seq_len, start)[: text.max_windows]
    if len(windows) == 0:
        raise UserError(
            f"too little text in {text.source}: its {len(stream)} tokens make no window of {text.seq_len}; "
            f"use more text or --seq-len {max(2, len(stream))}"
        )
    return windows
