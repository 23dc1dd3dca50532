"""Split examples into rows to train on and held-out rows."""

import random
from collections.abc import Sequence

from hifiprune.config.recover import TrainingConfig
from hifiprune.engine.context import check_vocabulary
from hifiprune.errors import UserError
from hifiprune.recovery.packing import Packed, cut_to, pack
from hifiprune.recovery.training_data import Example

HELD_OUT_ROWS = 128
"""Maximum number of held-out rows to evaluate."""


def split(
    examples: Sequence[Example],
    training: TrainingConfig,
    vocabulary: int,
    *,
    together: bool = True,
    start: Sequence[int] = (),
) -> tuple[Packed, Packed]:
    """Split into training rows and held-out rows: different examples, or different pieces of very few long ones.

    An example longer than a row is as many as its pieces, each of which begins with `start` where the example does.
    """
    check_vocabulary(max(max(example.tokens) for example in examples), vocabulary)
    pieces = [[*cut_to(example, training.seq_len, start)] for example in examples]
    if training.held_out * len(pieces) < 1:
        pieces = [[piece] for example in pieces for piece in example]
    order = random.Random(training.seed).sample(pieces, len(pieces))
    count = max(1, round(training.held_out * len(order)))
    parts = ([piece for example in part for piece in example] for part in (order[count:], order[:count]))
    rows, held = (pack(part, training.seq_len, seed=training.seed, together=together) for part in parts)
    if not len(rows) or not len(held):
        raise UserError(f"too little data: {len(order)} examples make no row to train on and one to hold out")
    return rows, held.first(HELD_OUT_ROWS)
