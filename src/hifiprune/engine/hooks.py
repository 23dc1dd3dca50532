"""How a run through the blocks is tapped: what is recorded of it, and by which means."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.engine.lm_head import precise
from hifiprune.models.mlp import LinearMap, Mlp, siblings


@dataclass
class MapPass:
    """One linear map of an MLP in a run: its input and its output, later with the gradient at the output.

    Attributes:
        linear: the map.
        input: `[windows, positions, in_features]`.
        output: `[windows, positions, out_features]`, or the gradient there.
    """

    linear: LinearMap
    input: Tensor
    output: Tensor


@dataclass
class MlpPass:
    """One MLP in a run of its block.

    Attributes:
        number: of the MLP.
        maps: what went through its maps, the output map last.
        tokens: of an expert those that it saw, by their numbers in the batch, one row of its maps each; else None.
    """

    number: int
    maps: list[MapPass]
    tokens: Int[Tensor, "rows"] | None = None

    def spread(self, rows: Tensor, hidden: Float[Tensor, "windows positions hidden"]) -> Tensor:
        """Rows as `[windows, positions, ...]`, zero where the MLP did not see a token."""
        if self.tokens is None:
            return rows
        whole = rows.new_zeros(hidden.shape[:-1].numel(), rows.shape[-1])
        return whole.index_copy_(0, self.tokens, rows).view(*hidden.shape[:-1], -1)

    def activation(self, hidden: Float[Tensor, "windows positions hidden"]) -> Tensor:
        """What goes into the output map, as `[windows, positions, neurons]`."""
        return self.spread(self.maps[-1].input.detach(), hidden)


@dataclass
class Seen:
    """What a sweep shows of one MLP.

    Attributes:
        layer: number of the MLP.
        kernel: number of the objective that was differentiated; None on the way forward.
        activation: `h`, `[windows, positions, neurons]`, to be left as it is.
        gradient: `dC/dh` in the same shape, gone once `taylor` is asked for; None on the way forward.
        maps: input and output gradient of each linear map, where asked for; the output map comes last.
        windows: number of the first of the windows.
    """

    layer: int
    kernel: int | None
    activation: Tensor
    gradient: Tensor | None = None
    maps: list[MapPass] = field(default_factory=list)
    windows: int = 0

    @cached_property
    def taylor(self) -> Tensor:
        """`h * dC/dh` in float32 or better, computed once in place of the gradient."""
        assert self.gradient is not None
        return precise(self.gradient).mul_(self.activation)


Visit = Callable[[Seen], None]


@dataclass(frozen=True)
class BlockCall:
    """What the model's own forward passes to one block beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Trace:
    """One block's run: its input and, with the graph between them, its MLPs and its output."""

    input: Tensor
    mlps: list[MlpPass]
    output: Tensor


Write = Callable[[int, Tensor, Tensor | None], Tensor]
"""From an MLP's number, its activation and the tokens that it sees to what its output map makes of that."""
Read = Callable[[int, Sequence[LinearMap], Tensor], Tensor]
"""From an MLP's number, input maps that share a parameter and their input to what they make of it, side by side."""
Tap = tuple[nn.Module, Callable[..., Any]]
"""A module, and what takes the place of its forward."""


def taps_on(mlps: Sequence[Mlp], first: int, hidden: Tensor, write: Write, read: Read | None = None) -> list[Tap]:
    """What has the MLPs of a block, the first of them of that number, go through `write`, and `read` if given."""
    found: list[Tap] = []
    for place, group in siblings(mlps):
        if group[0].is_expert:
            found.append((group[0].output.module, partial(_routed, group, first + place.start, write, read)))
        else:
            found += _plain_taps(group[0], first + place.start, hidden, write, read)
    return found


def _plain_taps(mlp: Mlp, number: int, hidden: Tensor, write: Write, read: Read | None) -> Iterator[Tap]:
    def reading(linears: Sequence[LinearMap], values: Tensor) -> Tensor:
        assert read
        return as_rows(read(number, linears, in_windows(values, hidden)), values)

    yield mlp.output.module, lambda values: as_rows(write(number, in_windows(values, hidden), None), values)
    if read:
        for module in dict.fromkeys(each.module for each in mlp.inputs):
            yield module, partial(reading, [each for each in mlp.inputs if each.module is module])


def _routed(
    experts: Sequence[Mlp],
    first: int,
    write: Write,
    read: Read | None,
    hidden: Float[Tensor, "tokens hidden"],
    chosen: Int[Tensor, "tokens top"],
    weights: Float[Tensor, "tokens top"],
) -> Float[Tensor, "tokens hidden"]:
    """What experts make of the tokens that a router sent each of them, weighed before the output map, not after it."""
    module: Any = experts[0].output.module
    total = torch.zeros_like(hidden)
    for expert, mlp in enumerate(experts):
        tokens, place = torch.where(chosen == expert)
        rows = hidden[tokens]
        both = (
            read(first + expert, mlp.inputs, rows) if read else torch.cat([linear(rows) for linear in mlp.inputs], -1)
        )
        activation = module._apply_gate(both) * weights[tokens, place, None].to(rows.dtype)
        total = total.index_add(0, tokens, write(first + expert, activation, tokens))
    return total


def in_windows(values: Tensor, hidden: Float[Tensor, "windows positions hidden"]) -> Tensor:
    """The input of a map as `[windows, positions, inputs]`, also where a block runs all tokens in one row."""
    return values if values.ndim == hidden.ndim else values.view(*hidden.shape[:-1], -1)


def as_rows(output: Tensor, given: Tensor) -> Tensor:
    """The output of a map in the form that its input was given in."""
    return output if output.ndim == given.ndim else output.flatten(0, -2)


def grown(tensor: Tensor) -> Tensor:
    """`tensor` as part of a graph: in the first block nothing before the MLP has one, so it starts here."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


class KnownProduct(torch.autograd.Function):
    """`activation @ weight.T + bias` where the result is already known: only the gradient is computed."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, weight: Tensor, product: Tensor) -> Tensor:
        """The known result."""
        ctx.save_for_backward(weight)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient at the activation."""
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None


@contextmanager
def overridden(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward of each module within; an override that was there before (accelerate's) comes back after."""
    before = [module.__dict__.get("forward") for module, _ in pairs]
    try:
        for module, forward in pairs:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), earlier in zip(pairs, before, strict=True):
            del module.__dict__["forward"]
            if earlier is not None:
                module.__dict__["forward"] = earlier


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Experts run one by one within; all at once they take neither float64 nor any width."""
    config: Any = model.config.get_text_config()
    before = getattr(config, "_experts_implementation", None)
    try:
        if before is not None:
            config._experts_implementation = "eager"
        yield
    finally:
        if before is not None:
            config._experts_implementation = before
