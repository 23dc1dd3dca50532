"""Objectives of the logits, evaluated a slice of positions at a time, so that the logits never exist as a whole."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hifiprune.engine.lm_head import Head


@dataclass
class Rows:
    """Consecutive positions of one window.

    Attributes:
        logits: float32 or better; a kernel overwrites them with its gradient.
        labels: the token that follows each position; anything at a window's last position.
        weights: of the labels in a mean over positions: positions / (positions - 1), and 0 where no token follows.
        teacher: the teacher's logits, where there is a teacher.
        window: number of the window.
        start: position of the first row in its window.
        positions: of the window.
    """

    logits: Float[Tensor, "rows vocabulary"]
    labels: Int[Tensor, "rows"]
    weights: Float[Tensor, "rows"]
    teacher: Float[Tensor, "rows vocabulary"] | None
    window: int
    start: int
    positions: int

    def split(self, size: int) -> Iterator["Rows"]:
        """Yield views of at most `size` rows."""
        for first in range(0, len(self.logits), size):
            part = slice(first, first + size)
            yield replace(
                self,
                logits=self.logits[part],
                labels=self.labels[part],
                weights=self.weights[part],
                teacher=None if self.teacher is None else self.teacher[part],
                start=self.start + first,
            )


Kernel = Callable[[Rows], Float[Tensor, "rows"]]
"""Objective per position: overwrites the logits with its gradient and returns its value in nats."""


def mean_over_positions(
    kernels: Sequence[Kernel],
    hidden: Float[Tensor, "windows positions hidden"],
    head: Head,
    tokens: Int[Tensor, "windows positions"],
    *,
    teacher: Float[Tensor, "windows positions hidden"] | None = None,
    first_window: int = 0,
    slice_rows: int | None = None,
) -> list[tuple[Float[Tensor, "windows"], Float[Tensor, "windows positions hidden"]]]:
    """Average each kernel over the positions of each window, and return its gradient at `hidden`.

    Same as `kernel(head.logits(hidden)).mean(-1)` and its autograd gradient, without storing the logits.

    Args:
        kernels: objectives per position.
        hidden: the model's final hidden state after its last norm, any floating dtype.
        head: maps it to logits.
        tokens: the windows' token ids, of which each position's next one is its label.
        teacher: the teacher's final hidden state, for kernels that need it; the head is the same.
        first_window: number of the first window, for kernels that draw labels.
        slice_rows: positions per matrix product; see `Head.slice_rows`.

    Returns:
        for each kernel values in nats in float32 or better, one a window, and the gradient in the same.
    """
    if not kernels:
        return []
    windows, positions, _ = hidden.shape
    teacher = None if teacher is None else teacher.to(hidden.device)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(len(kernels), windows, positions, dtype=dtype)
    gradients = [torch.empty_like(hidden, dtype=dtype) for _ in kernels]
    labels = tokens.roll(-1, 1)
    weights = values.new_full((positions,), positions / max(1, positions - 1))
    weights[-1] = 0
    step = slice_rows or head.slice_rows
    for window in range(windows):
        for start in range(0, positions, step):
            here = slice(start, start + step)
            logits = head.logits(hidden[window, here])
            guide = None if teacher is None else head.logits(teacher[window, here])
            for number, kernel in enumerate(kernels):
                own = logits if number == len(kernels) - 1 else logits.clone()
                rows = Rows(own, labels[window, here], weights[here], guide, first_window + window, start, positions)
                parts = [through_cap(kernel, part, head.cap) for part in rows.split(head.cache_rows)]
                values[number, window, here] = torch.cat(parts)
                gradients[number][window, here] = head.pull_back(own).div_(positions)
    return list(zip(values.mean(-1), gradients, strict=True))


def through_cap(kernel: Kernel, rows: Rows, cap: float | None) -> Float[Tensor, "rows"]:
    """Apply `kernel` to soft-capped logits and carry its gradient to before the cap."""
    if cap is None:
        return kernel(rows)
    slope = 1 - (rows.logits / cap).square()  # d(cap * tanh(z / cap))/dz
    values = kernel(rows)
    rows.logits *= slope
    return values
