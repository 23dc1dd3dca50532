"""Read training examples: rows of text, instructions, answers or conversations become tokens with labels."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.io.chat_templates import ChatTemplate, Piece
from hifiprune.io.text_sources import TEXT_COLUMNS, Row, check_text, read_parts
from hifiprune.io.tokenization import encode_plainly, special_tokens
from hifiprune.progress import track
from hifiprune.recovery.time_limit import TimeLimit

T = TypeVar("T")

ANSWERS = ("output", "response", "completion", "answer")
"""Columns of the answer to an instruction or a prompt."""
ROWS_AHEAD = 32
"""Number of rows to prefetch, so that templates run while other rows are tokenized."""
ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
)
"""Stanford Alpaca's prompt formats, which both papers use for recovery training."""


@dataclass(frozen=True)
class Example:
    """One document, answer or conversation.

    Attributes:
        tokens: token ids, int32 where they were read, since there may be many.
        learned: whether each of them is a label, a byte each; in the papers only the answer's and the end are.
    """

    tokens: Sequence[int]
    learned: Sequence[bool] | bytes


def read_examples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    learn_prompts: bool = False,
    text_column: str | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    limit: TimeLimit | None = None,
) -> list[Example]:
    """Read every row of a source as an example; its columns tell the format.

    Formats, first match: `messages` (a conversation, by the tokenizer's chat template, with labels on the assistant's
    turns; one example per turn where the template writes earlier turns differently once a later one follows);
    `instruction`, optionally `input`, and an answer (Stanford Alpaca's format); `prompt` and an answer; a text, with
    labels on all of it. Answers and texts end with the end-of-text token.

    Args:
        source: see `hifiprune.io.text_sources.read_parts`.
        tokenizer: of the model.
        learn_prompts: make labels of everything.
        text_column: column of the text, guessed if not given.
        max_rows: of a hub data set; all if not given.
        seed: of the order in which a hub data set is read.
        limit: wall-clock limit of the run, which ends the reading too.

    Raises:
        UserError: there is nothing to learn from, or a row has none of these shapes.
    """
    examples: list[Example] = []
    ends = _written_around(tokenizer)

    def tracked(items: Iterable[T]) -> Iterator[T]:
        return track(limit.within(items) if limit else items, "reading the data, rows")

    with ChatTemplate(tokenizer) as template:
        for part in read_parts(source, seed, max_rows):
            if part.text is not None:
                pieces = _plain_text(tracked(part.text), ends)
                examples.append(encode_pieces(pieces, tokenizer, learn_all=learn_prompts))
                continue
            rows = enumerate(tracked(part.rows), 1)
            while some := list(islice(rows, ROWS_AHEAD)):
                template.ask([row["messages"] for _, row in some if "messages" in row and text_column is None])
                for number, row in some:
                    try:
                        texts = list(_texts(row, ends, template, text_column))
                    except UserError as error:
                        raise UserError(f"{part.where}, row {number}: {error}") from error
                    examples += (encode_pieces(pieces, tokenizer, learn_all=learn_prompts) for pieces in texts)
    examples = [example for example in examples if any(example.learned[1:])]  # nothing predicts the first token
    if not examples:
        raise UserError(f"{source} holds nothing to learn from: no row has a text or an answer")
    return examples


def encode_pieces(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, *, learn_all: bool = False) -> Example:
    """Tokenize the pieces' joined text as a whole; tokens that end in a learned piece get labels."""
    read: list[Piece] = []
    ends: list[int] = []

    def texts() -> Iterator[str]:
        for piece in pieces:
            read.append(piece)
            ends.append(len(piece.text) + (ends[-1] if ends else 0))
            yield piece.text

    ids, learned, place = array("i"), bytearray(), 0
    for tokens in encode_plainly(tokenizer, texts()):
        ids.extend(tokens.ids)
        for end in tokens.ends:
            while place < len(ends) - 1 and end > ends[place]:
                place += 1
            learned.append(learn_all or read[place].learned)
    return Example(ids, bytes(learned))


def _plain_text(text: Iterable[str], ends: tuple[str, str]) -> Iterator[Piece]:
    """Yield a text in pieces, all learned, with special tokens written out; nothing for an empty text."""
    filled = (piece for piece in text if piece)
    first = next(filled, None)
    if first is not None:
        yield Piece(ends[0], False)
        yield from (Piece(piece, True) for piece in chain([first], filled))
        yield Piece(ends[1], True)


def _texts(row: Row, ends: tuple[str, str], template: ChatTemplate, text_column: str | None) -> Iterator[list[Piece]]:
    """Yield the text of a row in pieces, with special tokens written out; several texts for some conversations."""
    start, end = ends
    answer = next((name for name in ANSWERS if name in row), None)
    column = text_column or next((name for name in TEXT_COLUMNS if name in row), None)
    if text_column is None and "messages" in row:
        yield from template.texts(row["messages"])
    elif text_column is None and answer and "instruction" in row:
        given = _text(row, "input") if "input" in row else ""
        context = f"\n\n### Input:\n{given}" if given else ""
        also = ", paired with an input that provides further context" if context else ""
        asked = f"\n\n### Instruction:\n{_text(row, 'instruction')}{context}\n\n### Response:\n"
        yield [Piece(start + ALPACA.format(also=also) + asked, False), Piece(_text(row, answer) + end, True)]
    elif text_column is None and answer and "prompt" in row:
        yield [Piece(start + _text(row, "prompt"), False), Piece(_text(row, answer) + end, True)]
    elif column in row:
        if text := _text(row, column):
            yield [Piece(start, False), Piece(text + end, True)]
    else:
        wanted = f"a text called {text_column}" if text_column else "a text, which --text-column can name"
        raise UserError(
            f"the columns are {', '.join(row)}; needed are messages, instruction and output, prompt and response, "
            f"or {wanted}"
        )


def _text(row: Row, column: str) -> str:
    """Return the text of a column; empty if it is null."""
    found = row[column]
    if found is not None and not isinstance(found, str):
        raise UserError(f"column '{column}' holds {type(found).__name__}, not text; conversations go in 'messages'")
    return check_text(found or "")


def _written_around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what stands before a text, as the tokenizer writes it, and the end-of-text token, which stands after."""
    start = tokenizer.convert_ids_to_tokens(special_tokens(tokenizer)[0])
    return "".join(start), str(tokenizer.eos_token or "")
