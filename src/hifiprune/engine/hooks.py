"""Hooks that record, or change, what goes through the projections of MLPs while decoder blocks run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.engine.lm_head import at_least_float32
from hifiprune.models.mlp import Mlp, Projection, group_by_parameters


@dataclass
class ProjectionPass:
    """Input and output of one projection of an MLP in one forward pass.

    Attributes:
        linear: the projection.
        input: `[windows, positions, in_features]`.
        output: `[windows, positions, out_features]`, or the gradient there.
    """

    linear: Projection
    input: Tensor
    output: Tensor


@dataclass
class MlpPass:
    """Inputs and outputs of one MLP in one forward pass of its block.

    Attributes:
        number: index of the MLP.
        projections: its projections' inputs and outputs, the output projection last.
        tokens: for an expert the indices of the batch's tokens that were routed to it, one row each; else None.
    """

    number: int
    projections: list[ProjectionPass]
    tokens: Int[Tensor, "rows"] | None = None

    def spread(self, rows: Tensor, hidden: Float[Tensor, "windows positions hidden"]) -> Tensor:
        """Scatter an expert's rows to `[windows, positions, ...]`, with zeros where it received no token."""
        if self.tokens is None:
            return rows
        whole = rows.new_zeros(hidden.shape[:-1].numel(), rows.shape[-1])
        return whole.index_copy_(0, self.tokens, rows).view(*hidden.shape[:-1], -1)

    def activation(self, hidden: Float[Tensor, "windows positions hidden"]) -> Tensor:
        """Return the input of the output projection, as `[windows, positions, neurons]`."""
        return self.spread(self.projections[-1].input.detach(), hidden)


@dataclass
class Activations:
    """The activations of one MLP, and on the way back their gradients, as a sweep hands them to its visitor.

    Attributes:
        layer: index of the MLP.
        kernel: index of the objective that was differentiated; None in the forward pass.
        activation: `h`, `[windows, positions, neurons]`, to be left as it is.
        gradient: `dC/dh` in the same shape, overwritten by `taylor`; None in the forward pass.
        projections: input and output gradient of each projection, if requested; the output projection comes last.
        windows: index of the first window.
    """

    layer: int
    kernel: int | None
    activation: Tensor
    gradient: Tensor | None = None
    projections: list[ProjectionPass] = field(default_factory=list)
    windows: int = 0

    @cached_property
    def taylor(self) -> Tensor:
        """Compute `h * dC/dh` in float32 or better, once, in place of the gradient."""
        assert self.gradient is not None
        if self.gradient.device.type == "cpu" or self.gradient.dtype.itemsize >= torch.float32.itemsize:
            return at_least_float32(self.gradient).mul_(self.activation)
        return float32_product(self.gradient, self.activation)


def float32_product(one: Tensor, other: Tensor) -> Tensor:
    """Multiply two tensors of a 16-bit dtype; same as `one.float() * other.float()`, by one kernel of a GPU."""
    return torch.addcmul(_zero(one.device), one, other)


@cache
def _zero(device: torch.device) -> Float[Tensor, "1"]:
    return torch.zeros(1, device=device)


ActivationHook = Callable[[Activations], None]


@dataclass(frozen=True)
class BlockCall:
    """The arguments, apart from the hidden state, that the model's own forward passes to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Trace:
    """One block's forward pass with its autograd graph: input, MLPs and output."""

    input: Tensor
    mlps: list[MlpPass]
    output: Tensor


Write = Callable[[int, Tensor, Tensor | None], Tensor]
"""Maps an MLP's index, its activation and its tokens to the output of its output projection."""
Read = Callable[[int, Sequence[Projection], Tensor], Tensor]
"""Maps an MLP's index, input projections that share a parameter, and their input to their outputs, concatenated."""
Override = tuple[nn.Module, Callable[..., Any]]
"""A module, and the function that replaces its forward."""


def overrides_on(
    mlps: Sequence[Mlp], first: int, hidden: Tensor, write: Write, read: Read | None = None
) -> list[Override]:
    """Return the overrides that send a block's MLPs, the first with index `first`, through `write` and `read`."""
    found: list[Override] = []
    for place, group in group_by_parameters(mlps):
        if group[0].is_expert:
            found.append((group[0].output.module, partial(_routed, group, first + place.start, write, read)))
        else:
            found += _plain_overrides(group[0], first + place.start, hidden, write, read)
    return found


def _plain_overrides(mlp: Mlp, number: int, hidden: Tensor, write: Write, read: Read | None) -> Iterator[Override]:
    def reading(linears: Sequence[Projection], values: Tensor) -> Tensor:
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
    """Run the experts on the tokens routed to them; routing weights are applied before the output projection."""
    module: Any = experts[0].output.module
    total = torch.zeros_like(hidden)
    for expert, (mlp, places) in enumerate(zip(experts, places_of(chosen, len(experts)), strict=True)):
        tokens = places // chosen.shape[-1]
        rows = hidden[tokens]
        both = (
            read(first + expert, mlp.inputs, rows) if read else torch.cat([linear(rows) for linear in mlp.inputs], -1)
        )
        activation = module._apply_gate(both) * weights.flatten()[places, None].to(rows.dtype)
        total = total.index_add(0, tokens, write(first + expert, activation, tokens))
    return total


def places_of(chosen: Int[Tensor, "tokens top"], experts: int) -> list[Int[Tensor, "_"]]:
    """Return where each expert is chosen, in the order of tokens; a GPU is waited for once, not for each expert.

    Same as `[(chosen.flatten() == expert).nonzero().flatten() for expert in range(experts)]`.
    """
    numbers, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(numbers, torch.arange(experts, device=chosen.device), right=True).tolist()
    return [order[start:end] for start, end in pairwise([0, *ends])]


def in_windows(values: Tensor, hidden: Float[Tensor, "windows positions hidden"]) -> Tensor:
    """Reshape a projection's input to `[windows, positions, inputs]`, also where a block flattens all tokens."""
    return values if values.ndim == hidden.ndim else values.view(*hidden.shape[:-1], -1)


def as_rows(output: Tensor, given: Tensor) -> Tensor:
    """Reshape a projection's output to the form of its input."""
    return output if output.ndim == given.ndim else output.flatten(0, -2)


def requiring_grad(tensor: Tensor) -> Tensor:
    """Make `tensor` require grad: in the first block nothing before the MLP does, so the graph starts here."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


class KnownProduct(torch.autograd.Function):
    """Compute the gradient of `activation @ weight.T + bias` when the product itself is already known."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, weight: Tensor, product: Tensor) -> Tensor:
        """Return the known product."""
        ctx.save_for_backward(weight)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the activation."""
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
    """Run experts one by one within this context; grouped products take neither float64 nor every width."""
    config: Any = model.config.get_text_config()
    before = getattr(config, "_experts_implementation", None)
    try:
        if before is not None:
            config._experts_implementation = "eager"
        yield
    finally:
        if before is not None:
            config._experts_implementation = before
