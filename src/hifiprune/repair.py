"""Repair of a cut in closed form: the neurons that stay take over what the removed ones did, as far as they can.

Removing neurons `R` of an MLP with output map `W` leaves the plain cut `h_K W_K`. What is missing, the residual `D`, is
regressed on the activations `h_K` that are still there, by ridge regression over all tokens:

    change = argmin  sum over tokens of  weight * |D - change h_K|^2  +  damping * |change|^2,    W' = W_K + change

so damping leads back to the plain cut, not to zero. `D` is what the removed neurons wrote (parallel form), or the whole
difference to the dense model's residual stream, errors of earlier blocks included (sequential form). How much damping,
and whether the change is taken at all, is decided for each map by windows that were held out.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.blocks import BlockChain
from hifiprune.errors import RunError, UserError
from hifiprune.guards import check_windows, frozen, memory_explained
from hifiprune.head import precise
from hifiprune.neurons import find_mlps
from hifiprune.plan import Plan
from hifiprune.second_order import gram
from hifiprune.surgery import keep_, matching_mlps, others, put_back, state_widths
from hifiprune.taps import BlockCall, overridden

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)
"""Candidates in falling order, relative to the mean square of an activation."""
HELD_OUT = 8
"""Every so many windows one is held out."""


@dataclass(frozen=True)
class Refit:
    """How the refit of one output map went.

    Attributes:
        name: of the MLP or attention.
        damping: that was best on held-out windows; None if the plain cut was.
        plain_error: squared residual of the plain cut on held-out windows, relative to that of the dense output.
        error: the same after the refit.
    """

    name: str
    damping: float | None
    plain_error: float
    error: float


@torch.no_grad()
def cut_and_repair_(
    model: PreTrainedModel,
    plan: Plan,
    windows: Int[Tensor, "windows positions"],
    *,
    sequential: bool = True,
    weighted: bool = True,
    attention: bool = False,
    dense: Float[Tensor, "blocks windows positions hidden"] | None = None,
    batch_size: int = 1,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda layers: layers,
) -> list[Refit]:
    """Cut `model` by `plan`, and refit each output map so that the dense model's hidden states are kept.

    Args:
        model: the dense model.
        plan: which neurons to keep.
        windows: token ids, at least two windows.
        sequential: close the whole difference to the dense residual stream; else only what the block's own cut opens,
            as always in families whose MLPs do not write to the stream directly.
        weighted: weigh each token by the inverse square norm of the dense residual stream there, as the norms that
            read the stream do.
        attention: refit the output maps of the attention too, in the sequential form: they close what earlier cuts
            opened.
        dense: what `residual_stream` gives for the dense model and these windows, where several plans are tried.
        batch_size: windows per step; the result depends on it only by rounding.
        track: wraps the layers, to show progress.

    Returns:
        how each refit went.

    Raises:
        UserError: the plan or the windows do not fit the model.
        RunError: activations are not finite, or memory ran out.
    """
    check_windows(model, windows, batch_size)
    if len(windows) < 2:
        raise UserError("repair needs at least 2 windows, of which it holds one out")
    mlps = matching_mlps(model, plan)
    with frozen(model):
        chain = BlockChain(model)
        sequential = sequential and chain.family.additive
        streams = _start(chain, windows, batch_size, dense)
        refits = []
        for layer in track(range(len(mlps))):
            with memory_explained(model, windows[:batch_size].numel()):
                for site in _sites(chain, layer, plan.kept[layer], attention and sequential):
                    refits.append(_repair_(chain, layer, site, streams, sequential, weighted))
    state_widths(model, plan.widths)
    return refits


@contextmanager
def cut_and_repaired(
    model: PreTrainedModel, plan: Plan, windows: Int[Tensor, "windows positions"], **how: Any
) -> Iterator[list[Refit]]:
    """Have `model` cut and repaired as by `cut_and_repair_` within; after, every weight is back, bit for bit.

    What is cut away, and a copy of each output map, is set aside. The attention's maps must not be refitted.
    """
    maps = [parameter for mlp in find_mlps(model) for parameter in mlp.output.parameters()]
    before = [parameter.detach().clone() for parameter in maps]
    try:
        with put_back(model, plan):
            yield cut_and_repair_(model, plan, windows, **how)
    finally:
        for parameter, values in zip(maps, before, strict=True):
            parameter.data.copy_(values)


@torch.no_grad()
def residual_stream(
    model: PreTrainedModel, windows: Int[Tensor, "windows positions"], batch_size: int = 1
) -> Float[Tensor, "blocks windows positions hidden"]:
    """The hidden states after every block, on the CPU: as many numbers as blocks, windows, positions and width make."""
    found = []
    with frozen(model):
        chain = BlockChain(model)
        for batch in windows.split(batch_size):
            hidden, calls = chain.embed(batch.to(model.device, torch.int64))
            after = []
            for layer, call in enumerate(calls):
                hidden, _ = chain.run(layer, hidden, call)
                after.append(hidden.cpu())
            found.append(torch.stack(after))
    return torch.cat(found, 1)


@dataclass
class Stream:
    """A batch of windows on its way through the blocks, kept on the CPU.

    Attributes:
        calls: what the blocks are called with.
        held: which of its windows are held out.
        dense: the dense model's residual stream `[windows, positions, hidden]`.
        known: that after every block, if it was computed before.
        cut: that of the cut and repaired model; in the parallel form the dense one's.
    """

    calls: list[BlockCall]
    held: Bool[Tensor, "windows"]
    dense: Tensor
    cut: Tensor
    known: Float[Tensor, "blocks windows positions hidden"] | None


def _start(
    chain: BlockChain, windows: Int[Tensor, "windows positions"], batch_size: int, dense: Tensor | None
) -> list[Stream]:
    """All batches before the first block."""
    streams = []
    for batch, numbers in zip(windows.split(batch_size), torch.arange(len(windows)).split(batch_size), strict=True):
        hidden, calls = chain.embed(batch.to(chain.model.device, torch.int64))
        held = numbers % HELD_OUT == min(HELD_OUT, len(windows)) - 1
        known = dense[:, numbers] if dense is not None else None
        streams.append(Stream(calls, held, hidden.cpu(), hidden.cpu(), known))
    return streams


@dataclass(frozen=True)
class Site:
    """A linear map that writes to the residual stream.

    Attributes:
        name: of the module that it belongs to.
        linear: the map.
        kept: which of its inputs stay; all if None.
        skipped: the other module of the block that writes to the stream, left out where halves are taken one by one.
    """

    name: str
    linear: nn.Linear
    kept: Int[Tensor, "kept"] | None = None
    skipped: nn.Module | None = None

    def run(self, chain: BlockChain, layer: int, hidden: Tensor, call: BlockCall) -> tuple[Tensor, Tensor]:
        """The stream after the block, or after this half of it, and the map's input."""
        attention, nothing = chain.attention(layer), hidden.new_zeros(())

        def silent(*args: Any, **kwargs: Any) -> Any:
            return (nothing, None) if self.skipped is attention else nothing  # attention returns its weights too

        with overridden([(self.skipped, silent)] if self.skipped else []):
            output, tap = chain.run(layer, hidden, call, self.linear)
        return output, tap.input


def _sites(chain: BlockChain, layer: int, kept: Int[Tensor, "kept"], attention: bool) -> list[Site]:
    """What is refitted in a block, in the order in which the stream passes it."""
    mlp, heads = chain.mlps[layer], chain.attention(layer)
    kept = kept.to(chain.model.device)
    if not attention:
        return [Site(mlp.name, mlp.output, kept)]
    linear = heads.get_submodule(chain.family.attention_output)
    assert isinstance(linear, nn.Linear)
    name, module = mlp.name.rpartition(".")[0], chain.model.get_submodule(mlp.name)
    return [
        Site(f"{name}.{chain.family.attention}", linear, skipped=module),
        Site(mlp.name, mlp.output, kept, skipped=heads),
    ]


def _repair_(
    chain: BlockChain, layer: int, site: Site, streams: list[Stream], sequential: bool, weighted: bool
) -> Refit:
    """Take all batches through a block, or half of it; remove what is not kept, and refit the output map."""
    linear, device = site.linear, chain.model.device
    kept = torch.arange(linear.in_features, device=device) if site.kept is None else site.kept
    rest = others(kept, linear.in_features)
    removed = linear.weight[:, rest]
    if sequential:
        for stream in streams:
            stream.dense = _dense_output(chain, layer, site, stream)
        if site.kept is not None:
            keep_(chain.mlps[layer], kept)
    fit, held = Moments(), Moments()
    activations = []
    for stream in streams:
        start = stream.cut if sequential else stream.dense
        output, activation = site.run(chain, layer, start.to(device), stream.calls[layer])
        if sequential:
            stream.cut, dense = output.cpu(), stream.dense.to(device)
            residual = dense - output
        else:
            stream.dense, dense = output.cpu(), output
            activation, residual = activation[..., kept], functional.linear(activation[..., rest], removed)
        if linear.bias is not None:  # refitted as the weight of an input that is always 1
            activation = functional.pad(activation, (0, 1), value=1.0)
        activations += [activation.cpu()] if sequential else []
        scale = precise(dense).square().mean(-1, keepdim=True).rsqrt() if weighted else 1.0
        rows = [precise(each) * scale for each in (activation, residual, dense)]
        for moments, windows in ((fit, ~stream.held), (held, stream.held)):
            moments.add(*(each[windows.to(device)].flatten(0, 1) for each in rows))
    change, refit = _refit(site.name, fit, held)
    if not math.isfinite(refit.plain_error):
        raise RunError(f"activations of {site.name} are not finite; compute in another --dtype, such as float32")
    if not sequential:
        keep_(chain.mlps[layer], kept)
    if change is not None:
        _add_(linear, change.to(linear.weight))
        for stream, activation in zip(streams, activations, strict=False):  # none in the parallel form
            stream.cut += functional.linear(activation.to(device), change.to(linear.weight)).cpu()
    return refit


def _add_(linear: nn.Linear, change: Float[Tensor, "hidden kept"]) -> None:
    """Change the weight, and the bias by the last column if there is one."""
    linear.weight.add_(change[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.add_(change[:, -1])


def _dense_output(chain: BlockChain, layer: int, site: Site, stream: Stream) -> Tensor:
    """The dense model's stream after the block, or after half of it."""
    if stream.known is not None and site.skipped is None:
        return stream.known[layer]
    return site.run(chain, layer, stream.dense.to(chain.model.device), stream.calls[layer])[0].cpu()


class Moments:
    """Sums over tokens from which every ridge regression of the residual on the activations follows, in float64."""

    def __init__(self) -> None:
        self.gram = torch.zeros(())
        self.cross = torch.zeros(())
        self.residual = 0.0
        self.output = 0.0

    def add(
        self,
        activation: Float[Tensor, "tokens kept"],
        residual: Float[Tensor, "tokens hidden"],
        output: Float[Tensor, "tokens hidden"],
    ) -> None:
        """Add a batch: products in the tensors' dtype, sums in float64."""
        if not len(activation):
            return
        self.gram = self.gram.to(activation.device) + gram(activation).double()
        self.cross = self.cross.to(activation.device) + (residual.T @ activation).double()
        self.residual += float(residual.double().square().sum())
        self.output += float(output.double().square().sum())

    def error(self, change: Float[Tensor, "hidden kept"] | None) -> float:
        """Squared residual that is left after a change of the output map, relative to the output."""
        if change is None:
            return self.residual / self.output
        left = self.residual - 2 * (change * self.cross).sum() + ((change @ self.gram) * change).sum()
        return float(left) / self.output

    def solve(self, damping: float) -> Float[Tensor, "hidden kept"] | None:
        """The best change of the output map under a damping; None if the system cannot be solved."""
        damped = self.gram.clone()
        damped.diagonal().add_(damping * self.gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return None
        return torch.cholesky_solve(self.cross.T, factor).T

    def merge(self, other: "Moments") -> "Moments":
        """The sums over the tokens of both."""
        total = Moments()
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total


def _refit(name: str, fit: Moments, held: Moments) -> tuple[Float[Tensor, "hidden kept"] | None, Refit]:
    """The change whose damping is best on what is held out, solved on everything; None if the plain cut is better.

    Damping falls as long as that helps.
    """
    plain = least = held.error(None)
    best = None
    for damping in DAMPINGS:
        change = fit.solve(damping)
        error = least if change is None else held.error(change)
        if not error < least:
            break
        best, least = damping, error
    change = None if best is None else fit.merge(held).solve(best)
    return change, Refit(name, best, plain, least)
