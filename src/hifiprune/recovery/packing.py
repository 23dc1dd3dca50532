"""Pack several examples into rows of one length without attention between them.

Position ids restart with every example: from them transformers makes a block-diagonal attention mask, and flash
attention its sequence lengths.
"""

import hashlib
import random
from array import array
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from hifiprune.recovery.training_data import Example

IGNORED = -100
"""Label of a token that is ignored by the loss."""
OPEN_ROWS = 256
"""Number of open rows that are searched for room."""


class Packed(Dataset[dict[str, Tensor]]):
    """Rows of packed examples, each with `input_ids`, `position_ids` and `labels`, int64 `[positions]`.

    Labels stand at the token itself, as transformers has them; an example's first token has none, nor has filling.
    """

    def __init__(self, rows: Sequence[Sequence[Example]], length: int, filling: int):
        self.rows, self.length, self.filling = rows, length, filling

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, "positions"]]:
        """Return one row."""
        tokens: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        for example in self.rows[index]:
            tokens += example.tokens
            positions += range(len(example.tokens))
            shown = zip(example.tokens, [False, *example.learned[1:]], strict=True)
            labels += [token if learned else IGNORED for token, learned in shown]
        missing = self.length - len(tokens)
        tokens += [self.filling] * missing
        positions += range(missing)
        labels += [IGNORED] * missing
        found = {"input_ids": tokens, "position_ids": positions, "labels": labels}
        return {name: torch.tensor(values) for name, values in found.items()}

    def first(self, count: int) -> "Packed":
        """Return the first `count` rows."""
        return Packed(self.rows[:count], self.length, self.filling)

    def digest(self) -> str:
        """Hash the contents of all rows."""
        digest = hashlib.sha256(f"{self.length} {self.filling}\n".encode())
        for row in self.rows:
            digest.update(f"{[len(example.tokens) for example in row]}\n".encode())
            for example in row:
                digest.update(array("i", example.tokens).tobytes() + bytes(example.learned))
        return digest.hexdigest()


def pack(examples: Sequence[Example], length: int, *, filling: int = 0, seed: int = 0, together: bool = True) -> Packed:
    """Pack examples into rows of `length`, in random order, each into the first open row that has room.

    Longer examples are split into pieces; those without labels are dropped. If not `together`, as for models whose
    blocks cannot separate packed examples, each example gets its own row.
    """
    pieces = [piece for example in examples for piece in cut_to(example, length)]
    random.Random(seed).shuffle(pieces)
    rows: list[list[Example]] = []
    room: list[int] = []
    first = 0  # rows before it are as good as full
    shortest = min((len(piece.tokens) for piece in pieces), default=1)
    for piece in pieces:
        size = len(piece.tokens)
        open_rows = range(max(first, len(rows) - OPEN_ROWS), len(rows)) if together else ()
        place = next((row for row in open_rows if room[row] >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(piece)
        room[place] -= size
        while first < len(rows) and room[first] < shortest:
            first += 1
    return Packed(rows, length, filling)


def cut_to(example: Example, length: int, start: Sequence[int] = ()) -> list[Example]:
    """Return the pieces of an example that fit into rows of a length, without those that have nothing to learn.

    Args:
        example: tokens of a whole text.
        length: tokens of a row.
        start: tokens that the tokenizer writes before a text, with which every piece begins as the first one does.
    """
    tokens, learned, head = array("i", example.tokens), bytes(example.learned), array("i", start)
    if tokens[: len(head)] != head or len(head) + 1 >= length:
        head = array("i")
    size, step = len(head), length - len(head)
    parts = [
        Example(head + tokens[first : first + step], learned[:size] + learned[first : first + step])
        for first in range(size, len(tokens), step)
    ]
    return [part for part in parts if any(part.learned[1:])]
