"""The state of some windows on their way through the blocks."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from hifiprune.engine.hooks import BlockCall, Trace
from hifiprune.engine.spill import Spilled


@dataclass
class Batch:
    """The state of some windows on their way forward through the blocks, and back.

    Attributes:
        tokens: token ids.
        first_window: index of the first window.
        teacher: the teacher's final hidden state, for kernels that need one.
        hidden: hidden state before the next block.
        calls: the arguments of every block.
        stored: for each block so far its graph, or its input and, if known, its MLP's output.
        values: every objective for every window, in float32 or better.
        gradients: every objective's gradient at the output of the next block on the way back.
        final: the final hidden state after the last norm.
    """

    tokens: Int[Tensor, "windows positions"]
    first_window: int = 0
    teacher: Float[Tensor, "windows positions hidden"] | None = None
    hidden: Tensor = field(init=False)
    calls: list[BlockCall] = field(init=False)
    stored: list[Trace | tuple[Spilled, Tensor | None]] = field(default_factory=list)
    values: list[Float[Tensor, "windows"]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    final: Float[Tensor, "windows positions hidden"] = field(init=False)
