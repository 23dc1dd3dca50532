"""How a run through the blocks is tapped: what is recorded of it, and by which means."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hifiprune.head import precise
from hifiprune.neurons import LinearMap


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
    """One block's run: its input and, with the graph between them, its MLP's maps (output map last) and its output."""

    input: Tensor
    maps: list[MapPass]
    output: Tensor


def without(linear: LinearMap, removed: Tensor | None, activation: Tensor) -> Tensor:
    """What `linear` makes of an activation whose `removed` columns are zero."""
    return linear(activation if removed is None else activation.index_fill(-1, removed, 0))


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
