"""Token ids of texts of any length: long ones are tokenized in pieces, to the same ids as at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

from hifiprune.io.text_files import PIECE

OVERLAP = 1 << 12
"""Characters that two pieces share, unless more are needed."""
AGREEMENT = 16
"""Least number of tokens that two pieces share."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a part of a text, without special tokens.

    Attributes:
        start: characters of the text before the piece that was tokenized.
        encoding: what the tokenizer made of that piece.
        first: index of the first token of it that counts.
        last: index after the last one.
    """

    start: int
    encoding: BatchEncoding
    first: int
    last: int

    @property
    def ids(self) -> list[int]:
        """Return the token ids."""
        ids: list[int] = self.encoding["input_ids"][self.first : self.last]
        return ids

    @property
    def ends(self) -> list[int]:
        """Return the number of characters up to the end of each token; only fast tokenizers know it."""
        assert self.encoding.encodings
        return [self.start + end for _, end in self.encoding.encodings[0].offsets[self.first : self.last]]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of one text as the tokenizer makes them, without its warning about long texts."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Yield, in several lists, the token ids of a text that is given in pieces.

    Same as `encode(tokenizer, "".join(pieces))`, without holding more than some pieces of `PIECE` characters.
    """
    texts = _of_length(pieces, PIECE)
    first, second = next(texts), next(texts, None)
    if second is None:
        yield encode(tokenizer, first)
        return
    before, after = special_tokens(tokenizer)
    yield before
    for tokens in encode_plainly(tokenizer, chain([first, second], texts)):
        yield tokens.ids
    yield after


def encode_plainly(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Iterator[Tokens]:
    """Yield the tokens of a text that is given in pieces, without the special tokens that the tokenizer adds.

    Texts of more than `PIECE` characters are tokenized piece by piece. Neighbouring pieces overlap, and are joined in
    the middle of a run of tokens that both have, so that neither the end of the one nor the start of the other matters.
    Where there is no such run, as in a piece without a space, the text is cut.
    """
    texts = _of_length(pieces, PIECE)
    piece = _Piece.of(tokenizer, next(texts))
    for text in texts:
        tokens, piece = piece.followed_by(text, tokenizer)
        yield tokens
    yield piece.tokens_to(len(piece.ids))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what a tokenizer writes before and after every text, such as a start token."""
    plain, whole = _Piece.of(tokenizer, "a").ids, encode(tokenizer, "a")
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


@dataclass(frozen=True)
class _Piece:
    """A piece of a text, tokenized by itself.

    Attributes:
        text: characters of the piece.
        encoding: what the tokenizer made of it, without special tokens.
        start: characters of the text before it.
        taken: number of its first tokens in whose place those of the piece before are taken.
    """

    text: str
    encoding: BatchEncoding
    start: int = 0
    taken: int = 0

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str, start: int = 0) -> "_Piece":
        return cls(text, tokenizer(text, add_special_tokens=False, verbose=False), start)

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.encoding["input_ids"]
        return ids

    def tokens_to(self, last: int) -> Tokens:
        return Tokens(self.start, self.encoding, self.taken, last)

    def followed_by(self, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, "_Piece"]:
        """Return the tokens up to a place where both pieces agree, and the next piece, which goes on from there.

        The overlap is tokenized by itself too: it ends as this piece does and starts as the next one does, so that
        places in both are known by counting, whatever the tokenizer tells of characters.
        """
        overlap = OVERLAP
        while overlap < len(self.text):
            place = self._token_start(len(self.text) - overlap)
            shared = _Piece.of(tokenizer, self.text[place:]).ids
            following = _Piece.of(tokenizer, self.text[place:] + text, self.start + place)
            start = len(shared) - _alike(reversed(shared), reversed(self.ids[self.taken :]))
            end = _alike(shared, following.ids)
            if end - start >= max(AGREEMENT, len(shared) // 2):
                middle = (start + end) // 2
                tokens = self.tokens_to(len(self.ids) - len(shared) + middle)
                return tokens, _Piece(following.text, following.encoding, following.start, middle)
            overlap *= 8
        return self.tokens_to(len(self.ids)), _Piece.of(tokenizer, text, self.start + len(self.text))

    def _token_start(self, place: int) -> int:
        """Return where the token at a character starts, or else the last space before it."""
        if not self.encoding.is_fast:
            return max(self.text.rfind(" ", 0, place), self.text.rfind("\n", 0, place), 0)
        token = self.encoding.char_to_token(place)
        span = None if token is None else self.encoding.token_to_chars(token)
        return place if span is None else span.start


def _alike(one: Iterable[int], other: Iterable[int]) -> int:
    """Return how many tokens two sequences have in common from their start."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def _of_length(pieces: Iterable[str], length: int) -> Iterator[str]:
    """Yield the same text in pieces of a length, the last one excepted."""
    buffer = ""
    for piece in pieces:
        buffer += piece
        while len(buffer) > length:
            yield buffer[:length]
            buffer = buffer[length:]
    yield buffer
