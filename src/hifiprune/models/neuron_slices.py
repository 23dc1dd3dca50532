"""Which rows and columns of a model's parameters its neurons are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hifiprune.models.mlp import LinearMap, Mlp


@dataclass(frozen=True)
class Places:
    """Which rows or columns of a matrix are meant, or of each of those that are stacked.

    Attributes:
        rows: numbers in rising order, of each matrix; as many of each.
        dim: of a matrix, that they count along.
        stacked: whether the matrices lie in one tensor.
    """

    rows: list[Int[Tensor, "_"]]
    dim: int
    stacked: bool = False

    def matrices(self, values: Tensor) -> list[tuple[Tensor, Int[Tensor, "_"]]]:
        """Each matrix, in the tensor's own memory, and what is meant of it."""
        found = [*values] if self.stacked else [values]
        return [(each, rows.to(values.device)) for each, rows in zip(found, self.rows, strict=True)]

    def of(self, values: Tensor) -> Tensor:
        """What is meant, as a tensor of its own."""
        found = [each.index_select(self.dim, rows) for each, rows in self.matrices(values)]
        return torch.stack(found) if self.stacked else found[0]

    def shape(self, whole: Sequence[int], count: int | None = None) -> list[int]:
        """The shape of a tensor once it has only so many rows, by default those that are meant."""
        size, dim = list(whole), self.dim + self.stacked
        size[dim] = len(self.rows[0]) if count is None else count
        return size


@dataclass(frozen=True)
class Part:
    """A parameter that holds the neurons of one MLP, or of all experts of a block.

    Attributes:
        linear: one of the maps that share it.
        name: of the parameter in the module.
        dim: the dimension that counts neurons, of each expert's matrix where they are stacked.
    """

    linear: LinearMap
    name: str
    dim: int

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now."""
        found: nn.Parameter = getattr(self.linear.module, self.name)
        return found

    def places(self, chosen: Sequence[Int[Tensor, "chosen"]], neurons: int) -> Places:
        """Where some of so many neurons are, of each MLP."""
        rows = [torch.cat([each + number * neurons for number in range(self.linear.parts)]) for each in chosen]
        return Places(rows, self.dim, stacked=self.linear.expert is not None)

    def of(self, chosen: Sequence[Int[Tensor, "chosen"]], neurons: int) -> Tensor:
        """The values of some of so many neurons."""
        return self.places(chosen, neurons).of(self.parameter.detach())

    def set_(self, values: Tensor) -> None:
        """Give it other values and another shape; it stays the same object, for whoever else holds it."""
        self.parameter.data = values.detach()


def parts_of(mlp: Mlp) -> Iterator[Part]:
    """Where the neurons of an MLP are, those of the output map last; siblings have the same parts."""
    for linear in {(each.module, each.weight_name): each for each in mlp.inputs}.values():
        yield Part(linear, linear.weight_name, int(linear.flipped))
        if linear.bias is not None:
            yield Part(linear, "bias", 0)
    yield Part(mlp.output, mlp.output.weight_name, int(not mlp.output.flipped))
