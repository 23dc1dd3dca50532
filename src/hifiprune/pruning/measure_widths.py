"""Measure the width table: narrow each MLP alone, refit its output projection, and measure the KL divergence.

One matrix of moments serves all widths of an MLP. Its narrow versions have the dense shape, with zeros in the columns
of the removed neurons, so that the model itself stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.context import check_windows, frozen, memory_explained
from hifiprune.engine.divergence import small_divergence
from hifiprune.engine.hooks import BlockCall, overridden, overrides_on
from hifiprune.engine.lm_head import at_least_float32
from hifiprune.engine.offload import walk
from hifiprune.engine.spill import Spilled, spill
from hifiprune.engine.verify import verified_chain
from hifiprune.errors import UserError
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.resume import ResumeFolder, kept
from hifiprune.models.edit import others
from hifiprune.models.mlp import Mlp
from hifiprune.plan import top_indices
from hifiprune.progress import track
from hifiprune.pruning.repair import HELD_OUT, with_one
from hifiprune.pruning.ridge import HeldOut, gram
from hifiprune.scores import Scores
from hifiprune.width_table import WidthTable

CHOICES = 8
"""Widths measured of each MLP: eighths of its own."""
PROBES = 4
"""Held-out windows on which divergences are measured."""


@dataclass
class Batch:
    """A batch of windows on its way through the dense model.

    Attributes:
        hidden: residual stream, `[windows, positions, hidden]`.
        calls: arguments of the blocks.
        held: mask of held-out windows.
    """

    hidden: Spilled
    calls: list[BlockCall]
    held: Bool[Tensor, "windows"]


@torch.no_grad()
def measure_widths(
    model: PreTrainedModel,
    scores: Scores,
    windows: Int[Tensor, "windows positions"],
    *,
    choices: int = CHOICES,
    probes: int = PROBES,
    batch_size: int = 1,
    resume_folder: ResumeFolder | None = None,
) -> WidthTable:
    """Measure what each of several widths of every MLP costs.

    Args:
        model: dense model.
        scores: its scores, by which neurons are kept.
        windows: token ids, at least two windows; refits are fitted on them as a repair's are.
        choices: widths of each MLP, equally far apart; the largest is its own and costs nothing.
        probes: held-out windows on which divergences are measured, at most.
        batch_size: windows per step.
        resume_folder: folder to keep finished blocks in.

    Raises:
        UserError: the windows do not fit, or the model has experts, whose one width the configuration states.
        RunError: activations are not finite, or memory ran out.
    """
    check_windows(model, windows, batch_size)
    if len(windows) < 2:
        raise UserError("a table of widths needs at least 2 windows, of which it holds one out")
    held = torch.arange(len(windows)) % HELD_OUT == min(HELD_OUT, len(windows)) - 1
    table = WidthTable([], [], [], scores.criterion, scores.model_hash, hash_tokens(windows))
    with frozen(model):
        chain = verified_chain(model)
        if chain.family.experts or len(chain.mlps) != len(chain.blocks):
            raise UserError("a table of widths needs one MLP a block; experts have one width, stated for all")
        batches = _start(chain, windows, held, batch_size)
        probed = _start(chain, windows[held][:probes], held[held][:probes], 1)
        finals = chain.final_states([part.to(model.device, torch.int64) for part in windows[held][:probes].split(1)])
        for block in track(range(len(chain.blocks)), "measuring widths"):
            mlp = chain.mlps[block]
            widths = sorted({max(1, mlp.neurons * number // choices) for number in range(1, choices)})
            orders = [top_indices(scores.values[block], width) for width in widths]

            def measure() -> dict[str, list[float]]:
                with memory_explained(model, windows[:batch_size].numel()):
                    return {"costs": _costs(chain, block, orders, batches, probed, finals)}  # noqa: B023  called now

            facts = ["widths", block, table.data_hash, scores.criterion, scores.data_hash, choices, probes]
            costs = kept(resume_folder, facts, measure)["costs"]
            for _ in walk(model, [block]):
                for batch in batches + probed:
                    output, _ = chain.run(block, batch.hidden().to(model.device), batch.calls[block])
                    batch.hidden = spill(chain.scratch, output.cpu())
            table.names.append(mlp.name)
            table.widths.append([*widths, mlp.neurons])
            table.costs.append([*costs, 0.0])
    return table


def _start(
    chain: BlockChain, windows: Int[Tensor, "windows positions"], held: Bool[Tensor, "windows"], batch_size: int
) -> list[Batch]:
    """Return batches of windows before the first block."""
    batches = []
    for part, mask in zip(windows.split(batch_size), held.split(batch_size), strict=True):
        hidden, calls = chain.embed(part.to(chain.model.device, torch.int64))
        batches.append(Batch(spill(chain.scratch, hidden.cpu()), calls, mask))
    return batches


def _costs(
    chain: BlockChain,
    block: int,
    orders: Sequence[Int[Tensor, "width"]],
    batches: Sequence[Batch],
    probed: Sequence[Batch],
    finals: Sequence[Float[Tensor, "windows positions hidden"]],
) -> list[float]:
    """Return the mean divergence for each choice of the neurons kept in one block."""
    device, states = chain.model.device, []
    for _ in walk(chain.model, [block]):
        grams = _grams(chain, block, batches)
        for kept_neurons in orders:
            weight = _narrowed(chain.mlps[block], grams, kept_neurons.to(device))
            states.append([_run(chain, block, batch, weight) for batch in probed])
    for index in walk(chain.model, range(block + 1, len(chain.blocks))):
        for narrowed in states:
            for place, batch in enumerate(probed):
                narrowed[place] = chain.run_block(index, narrowed[place], batch.calls[index])
    head = chain.head.at_hand()
    costs = []
    for narrowed in states:
        pairs = zip(finals, narrowed, strict=True)
        divergences = [small_divergence(dense, chain.norm(hidden), head) for dense, hidden in pairs]
        costs.append(float(torch.cat(divergences).mean()))
    return costs


def _grams(chain: BlockChain, block: int, batches: Sequence[Batch]) -> list[Float[Tensor, "neurons neurons"]]:
    """Return the moments of the activations of fitted and of held-out windows, tokens weighted as in a repair."""
    device, linear, sums = chain.model.device, chain.mlps[block].output, [torch.zeros((), dtype=torch.float64)] * 2
    for batch in batches:
        dense, (tap,) = chain.run(block, batch.hidden().to(device), batch.calls[block])
        rows = at_least_float32(with_one(tap.projections[0].input, linear))
        size = at_least_float32(dense).square().mean(-1, keepdim=True)
        rows = rows * size.clamp(min=torch.finfo(size.dtype).tiny).rsqrt()
        for place, mask in enumerate((~batch.held, batch.held)):
            if mask.any():
                sums[place] = sums[place].to(device) + gram(rows[mask.to(device)].flatten(0, 1)).double()
    return sums


def _narrowed(
    mlp: Mlp, grams: Sequence[Float[Tensor, "neurons neurons"]], chosen: Int[Tensor, "width"]
) -> Float[Tensor, "hidden neurons"]:
    """Return the output projection, with its bias as last column, refitted to the neurons chosen; others are zero."""
    weight = mlp.output.weight.double()
    if mlp.output.bias is not None:
        weight = torch.cat([weight, mlp.output.bias.double()[:, None]], 1)
        chosen = torch.cat([chosen, chosen.new_tensor([mlp.neurons])])
    rest = others(chosen, weight.shape[1])
    moments = HeldOut(weighted=True)
    for part, sums in zip((moments.fit, moments.held), grams, strict=True):
        part.gram, part.cross = sums[chosen][:, chosen], weight[:, rest] @ sums[rest][:, chosen]
        part.residual = ((weight[:, rest] @ sums[rest][:, rest]) * weight[:, rest]).sum()
        part.output = ((weight @ sums) * weight).sum()
    change, _ = moments.refit(mlp.name)
    narrowed = torch.zeros_like(weight)
    narrowed[:, chosen] = weight[:, chosen] if change is None else weight[:, chosen] + change
    return narrowed.to(mlp.output.weight.dtype)


def _run(
    chain: BlockChain, block: int, batch: Batch, weight: Float[Tensor, "hidden neurons"]
) -> Float[Tensor, "windows positions hidden"]:
    """Run a block with another output projection, which has the bias as its last column."""
    mlp, hidden = chain.mlps[block], batch.hidden().to(chain.model.device)

    def write(number: int, activation: Tensor, tokens: Tensor | None) -> Tensor:
        return functional.linear(with_one(activation, mlp.output), weight)

    with overridden(overrides_on([mlp], block, hidden, write)):
        return chain.run_block(block, hidden, batch.calls[block])
