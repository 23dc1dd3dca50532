"""Ridge regression of a cut's residual on the remaining activations, with damping chosen on held-out tokens."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hifiprune.engine.lm_head import at_least_float32
from hifiprune.errors import RunError
from hifiprune.results import Refit

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)
"""Candidates in descending order, relative to the mean square of an activation."""
PARTS = 4
"""Parts in which a symmetric product is computed, to skip most of its mirrored half."""


class Moments:
    """Sums over tokens that determine every ridge regression of the residual on the activations, in float64."""

    def __init__(self) -> None:
        self.gram, self.cross, self.residual, self.output = (torch.zeros((), dtype=torch.float64) for _ in range(4))

    def add(
        self,
        activation: Float[Tensor, "tokens kept"],
        residual: Float[Tensor, "tokens hidden"],
        output: Float[Tensor, "tokens hidden"],
    ) -> None:
        """Add a batch; products are in the tensors' dtype, sums in float64, where the tensors are."""
        if not len(activation):
            return
        self.gram = _plus(self.gram, gram(activation))
        self.cross = _plus(self.cross, residual.T @ activation)
        self.residual = _plus(self.residual, residual.double().square().sum())
        self.output = _plus(self.output, output.double().square().sum())

    def error(self, change: Float[Tensor, "hidden kept"] | None) -> float:
        """Compute the squared residual after a change of the output projection, relative to the squared output."""
        left = self.residual
        if change is not None:
            left = left - 2 * (change * self.cross).sum() + ((change @ self.gram) * change).sum()
        return float(left / self.output)

    def solve(self, damping: float) -> Float[Tensor, "hidden kept"] | None:
        """Solve for the change of the output projection at a given damping; None if the system cannot be solved."""
        damped = self.gram.clone()
        damped.diagonal().add_(damping * self.gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return None
        return torch.cholesky_solve(self.cross.T, factor).T

    def merge(self, other: "Moments") -> "Moments":
        """Return the sums over the tokens of both."""
        total = Moments()
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total


def _plus(total: Tensor, values: Tensor) -> Tensor:
    """Return the sum in float64, written over the total once there is one."""
    if total.shape != values.shape or total.device != values.device:
        return total.to(values.device) + values.double()
    return total.add_(values)


class HeldOut:
    """Moments of the fitted and of the held-out tokens."""

    def __init__(self, weighted: bool):
        self.weighted = weighted
        self.fit, self.held = Moments(), Moments()

    def add(
        self,
        activation: Float[Tensor, "windows positions kept"],
        residual: Float[Tensor, "windows positions hidden"],
        dense: Float[Tensor, "windows positions hidden"],
        held: Bool[Tensor, "windows"],
    ) -> None:
        """Add a batch; each token is weighted by the inverse square of the dense stream's norm, or all equally.

        `held` is on the CPU, so that nothing waits for the device of the others.
        """
        size = at_least_float32(dense).square().mean(-1, keepdim=True)
        scale = size.clamp(min=torch.finfo(size.dtype).tiny).rsqrt() if self.weighted else 1.0
        rows = [at_least_float32(each) * scale for each in (activation, residual, dense)]
        for moments, windows in ((self.fit, ~held), (self.held, held)):
            numbers = windows.nonzero().flatten()
            if len(numbers) == len(held):
                moments.add(*(each.flatten(0, 1) for each in rows))
            elif len(numbers):
                moments.add(*(each[numbers.to(each.device)].flatten(0, 1) for each in rows))

    def refit(self, name: str) -> tuple[Float[Tensor, "hidden kept"] | None, Refit]:
        """Choose the damping on the held-out tokens and solve on all tokens; no change if the plain cut is better.

        Damping is lowered as long as that helps. An expert without fitted or held-out tokens is not changed.

        Raises:
            RunError: activations are not finite.
        """
        totals = [float(total) for each in (self.fit, self.held) for total in (each.residual, each.output)]
        if not all(map(math.isfinite, totals)):
            raise RunError(f"activations of {name} are not finite; check the checkpoint, or compute in --dtype float32")
        if not (totals[1] and totals[3]):
            return None, Refit(name, None, 0.0, 0.0)
        plain = least = self.held.error(None)
        best, fitted = None, None
        for damping in DAMPINGS:
            change = self.fit.solve(damping)
            error = least if change is None else self.held.error(change)
            if not error < least:
                break
            best, least, fitted = damping, error, change
        change = None if best is None else self.fit.merge(self.held).solve(best)
        before = self.fit.error(None)
        return change, Refit(name, best, plain, least, self.fit.error(fitted) / before if before else None)


def gram(rows: Float[Tensor, "tokens columns"]) -> Float[Tensor, "columns columns"]:
    """Compute `rows.T @ rows` with little more than half of the operations."""
    product = rows.new_empty(rows.shape[1], rows.shape[1])
    start = 0
    for part in rows.tensor_split(PARTS, 1):
        end = start + part.shape[1]
        torch.mm(part.T, rows[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
        start = end
    return product
