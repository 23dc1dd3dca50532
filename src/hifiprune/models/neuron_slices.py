"""Locate neurons in a model's parameters: the rows and columns that belong to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hifiprune.models.mlp import Mlp, Projection


@dataclass(frozen=True)
class Places:
    """Row or column indices of a matrix, or of each matrix in a stack.

    Attributes:
        rows: ascending indices for each matrix, the same number for all.
        dim: dimension of a matrix that they index.
        stacked: whether the matrices are stacked in one tensor.
    """

    rows: list[Int[Tensor, "_"]]
    dim: int
    stacked: bool = False

    def matrices(self, values: Tensor) -> list[tuple[Tensor, Int[Tensor, "_"]]]:
        """Return a view of each matrix with its indices."""
        found = [*values] if self.stacked else [values]
        return [(each, rows.to(values.device)) for each, rows in zip(found, self.rows, strict=True)]

    def of(self, values: Tensor) -> Tensor:
        """Copy the indexed rows or columns out of a tensor."""
        found = [each.index_select(self.dim, rows) for each, rows in self.matrices(values)]
        return torch.stack(found) if self.stacked else found[0]

    def shape(self, whole: Sequence[int], count: int | None = None) -> list[int]:
        """Return the shape of a tensor reduced to `count` rows, by default to the indexed ones."""
        size, dim = list(whole), self.dim + self.stacked
        size[dim] = len(self.rows[0]) if count is None else count
        return size


@dataclass(frozen=True)
class Part:
    """A parameter that holds the neurons of one MLP, or of all experts of a block.

    Attributes:
        linear: one of the projections that share it.
        name: name of the parameter in its module.
        dim: dimension of the neurons; that of each expert's matrix if experts are stacked.
    """

    linear: Projection
    name: str
    dim: int

    @property
    def parameter(self) -> nn.Parameter:
        """Return the current parameter."""
        found: nn.Parameter = getattr(self.linear.module, self.name)
        return found

    def places(self, chosen: Sequence[Int[Tensor, "chosen"]], neurons: int) -> Places:
        """Return the places of the chosen neurons of each MLP, which has `neurons` in all."""
        rows = [torch.cat([each + number * neurons for number in range(self.linear.parts)]) for each in chosen]
        return Places(rows, self.dim, stacked=self.linear.expert is not None)

    def of(self, chosen: Sequence[Int[Tensor, "chosen"]], neurons: int) -> Tensor:
        """Copy the values of the chosen neurons."""
        return self.places(chosen, neurons).of(self.parameter.detach())

    def set_(self, values: Tensor) -> None:
        """Set new values, of any shape; the parameter stays the same object for others that hold it."""
        self.parameter.data = values.detach()


def parameter_slices(mlp: Mlp) -> Iterator[Part]:
    """Yield the parameters that hold an MLP's neurons, the output one's last; experts of a block share theirs."""
    for linear in {(each.module, each.weight_name): each for each in mlp.inputs}.values():
        yield Part(linear, linear.weight_name, int(linear.flipped))
        if linear.bias is not None:
            yield Part(linear, "bias", 0)
    yield Part(mlp.output, mlp.output.weight_name, int(not mlp.output.flipped))
