"""Repair a cut in closed form: refit each output projection so that the kept neurons compensate for the removed ones.

Removing neurons `R` of an MLP with output projection `W` leaves the plain cut `h_K W_K`. The residual `D` is
regressed on the kept activations `h_K`, by ridge regression over all tokens:

    change = argmin  sum over tokens of  weight * |D - change h_K|^2  +  damping * |change|^2,    W' = W_K + change

so damping shrinks towards the plain cut, not towards zero. `D` is the output of the removed neurons (parallel form), or
the whole difference to the dense model's residual stream, including errors of earlier blocks (sequential form). The
damping, and whether the change is used at all, is decided for each projection on held-out windows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from time import monotonic

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.context import check_windows, frozen, memory_explained
from hifiprune.engine.hooks import BlockCall
from hifiprune.engine.memory import free_bytes
from hifiprune.engine.offload import offload_of, walk
from hifiprune.engine.spill import Spilled, spill
from hifiprune.engine.verify import verified_chain
from hifiprune.errors import UserError
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.detect import family_of
from hifiprune.models.edit import cuts_of, forget_gradients_, keep_, matching_mlps, others, state_widths
from hifiprune.models.mlp import Projection, find_blocks, locate_mlps
from hifiprune.plan import Plan
from hifiprune.progress import track
from hifiprune.pruning.finished_blocks import FinishedBlocks, Repair
from hifiprune.pruning.reconstruct import Example, Training, reconstruct_, trained_parameters
from hifiprune.pruning.ridge import HeldOut
from hifiprune.results import Reconstruction, Refit

HELD_OUT = 8
"""One window in this many is held out."""
STREAMS_SHARE = 0.5
"""Share of a GPU's free memory that streams and activations may take; else they are in the machine's."""
Keep = Callable[[Tensor], Spilled]


@torch.no_grad()
def cut_and_repair_(
    model: PreTrainedModel,
    plan: Plan,
    windows: Int[Tensor, "windows positions"],
    *,
    sequential: bool = True,
    weighted: bool = True,
    training: Training | None = None,
    dense: Float[Tensor, "blocks windows positions hidden"] | None = None,
    batch_size: int = 1,
    resume_folder: ResumeFolder | None = None,
) -> Repair:
    """Cut `model` by `plan`, and refit each output projection to reproduce the dense model's hidden states.

    Args:
        model: the dense model.
        plan: which neurons to keep.
        windows: token ids, at least two windows.
        sequential: fit the whole difference to the dense residual stream; otherwise only that of the block's own cut,
            as always in families with experts, or whose MLPs do not add to the stream directly.
        weighted: weight each token by the inverse square norm of the dense residual stream, as the norms that
            follow do.
        training: how to train every block after its refits, if at all; see `pruning.reconstruct`.
        dense: result of `residual_stream` for the dense model and these windows, if several plans are tried.
        batch_size: windows per step; the result depends on it only by rounding.
        resume_folder: folder to keep trained blocks in, from which an interrupted repair resumes.

    Returns:
        how each refit went, and the training of each block.

    Raises:
        UserError: the plan or the windows do not fit the model.
        RunError: activations are not finite, or memory ran out.
    """
    check_windows(model, windows, batch_size)
    if len(windows) < 2:
        raise UserError("repair needs at least 2 windows, of which it holds one out")
    mlps = matching_mlps(model, plan)
    with frozen(model):
        chain = verified_chain(model)
        streams = _start(chain, windows, max(plan.widths), batch_size, dense)
        form = _sequential_ if sequential and chain.family.additive and not chain.family.experts else _parallel_
        repair, finished = Repair(), None
        if resume_folder and training:
            facts = hash_tokens(windows), plan.to_json(), asdict(training), batch_size, sequential, weighted
            finished = FinishedBlocks(resume_folder, facts)
        cuts, blocks, begun = cuts_of(model, plan), range(len(chain.blocks)), monotonic()
        kept = [chosen.to(model.device) for chosen in plan.kept]
        for block, _ in zip(walk(model, blocks), track(blocks, "repairing"), strict=True):
            own = chain.of_block[block]
            chosen, inputs = kept[own.start : own.stop], [stream.cut for stream in streams]
            changed = changed_parameters(model, block, trained=training)
            with memory_explained(model, windows[:batch_size].numel()):
                known = finished.read(block) if finished else None
                if known:
                    _pass_dense_stream(chain, block, streams)
                    keep_(mlps[own.start : own.stop], chosen)
                    known.restore_(changed)
                    done = known.repair
                else:
                    done = Repair(form(chain, block, chosen, streams, weighted))
                    if training:
                        until = training.share(begun, len(blocks) - block)
                        done.reconstructions.append(_reconstruct_(chain, block, inputs, streams, training, until))
                    if finished:
                        finished.write(block, changed, done)
                if training:
                    _pass_cut_stream(chain, block, inputs, streams)
                repair.add(done)
                if chain.shelf:
                    chain.shelf.keep({name: cut for name, cut in cuts.items() if name in changed}, changed)
    forget_gradients_(mlps)
    state_widths(model, plan.widths)
    return repair


def changed_parameters(model: PreTrainedModel, block: int, *, trained: Training | None) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that a repair changes, by name: of output projections, and all trained ones."""
    module, path = find_blocks(model)[block], f"{family_of(model.config).blocks}.{block}"
    mlps = [mlp for mlp in locate_mlps(model) if mlp.block == block]
    names = {name: parameter for mlp in mlps for name, parameter in mlp.output.parameters().items()}
    if trained:
        own = trained_parameters(module, mlps, whole=trained.whole)
        names |= {f"{path}.{name}": parameter for name, parameter in own.items()}
    return names


def changed_tensors(model: PreTrainedModel, trained: Training | None) -> dict[str, Spilled]:
    """Return every tensor of a repaired model that a repair may have changed, by name."""
    if shelf := offload_of(model):
        return shelf.changed
    blocks = range(len(find_blocks(model)))
    changed = [changed_parameters(model, block, trained=trained) for block in blocks]
    return {name: spill(None, values.detach()) for names in changed for name, values in names.items()}


@torch.no_grad()
def residual_stream(
    model: PreTrainedModel, windows: Int[Tensor, "windows positions"], *, sequential: bool = True, batch_size: int = 1
) -> Float[Tensor, "blocks windows positions hidden"]:
    """Return the hidden states after every block, `[blocks][windows, positions, hidden]`, on the CPU."""
    found = []
    with frozen(model):
        chain = verified_chain(model)
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
    """A batch of windows on its way through the blocks.

    Attributes:
        keep: sets a tensor aside, where there is room for those of all batches.
        calls: arguments of the blocks.
        held: mask of held-out windows.
        dense: residual stream of the dense model, `[windows, positions, hidden]`.
        known: that stream after every block, if it was computed before.
        cut: residual stream of the cut and repaired model; in the parallel form the dense one.
    """

    keep: Keep
    calls: list[BlockCall]
    held: Bool[Tensor, "windows"]
    dense: Spilled
    cut: Spilled
    known: Float[Tensor, "blocks windows positions hidden"] | None


def _start(
    chain: BlockChain, windows: Int[Tensor, "windows positions"], width: int, batch_size: int, dense: Tensor | None
) -> list[Stream]:
    """Return all batches before the first block; the blocks' arguments depend only on a batch's shape."""
    keep = _keeper(chain, windows, width)
    streams: list[Stream] = []
    shape = None
    for batch, numbers in zip(windows.split(batch_size), torch.arange(len(windows)).split(batch_size), strict=True):
        hidden, calls = chain.embed(batch.to(chain.model.device, torch.int64))
        if hidden.shape == shape:
            calls = streams[0].calls
        shape = shape or hidden.shape
        held = numbers % HELD_OUT == min(HELD_OUT, len(windows)) - 1
        known = dense[:, numbers] if dense is not None else None
        start = keep(hidden)
        streams.append(Stream(keep, calls, held, start, start, known))
    return streams


def _keeper(chain: BlockChain, windows: Int[Tensor, "windows positions"], width: int) -> Keep:
    """Return what sets tensors aside: on a GPU if both streams and a block's activations fit, else as is asked for."""
    device = chain.model.device
    numbers = windows.numel() * (2 * chain.model.config.get_text_config().hidden_size + width)
    if device.type != "cpu" and numbers * chain.model.dtype.itemsize <= STREAMS_SHARE * free_bytes(device):
        return partial(spill, None)
    return lambda tensor: spill(chain.scratch, tensor.cpu())


def _sequential_(
    chain: BlockChain, block: int, kept: list[Int[Tensor, "_"]], streams: list[Stream], weighted: bool
) -> list[Refit]:
    """Fit the difference between the dense and the cut stream after this block, which has one MLP."""
    device, moments, activations = chain.model.device, HeldOut(weighted), []
    _pass_dense_stream(chain, block, streams)
    mlp = chain.mlps[chain.of_block[block].start]
    keep_([mlp], kept)
    linear = mlp.output
    for stream in streams:
        output, (tap,) = chain.run(block, stream.cut().to(device), stream.calls[block])
        stream.cut = stream.keep(output)
        dense, activation = stream.dense().to(device), tap.projections[0].input
        moments.add(with_one(activation, linear), dense - output, dense, stream.held)
        activations.append(stream.keep(activation))
    change, refit = moments.refit(mlp.name)
    if change is not None:
        change = change.to(linear.weight)
        _add_(linear, change)
        for stream, read in zip(streams, activations, strict=True):
            repaired = functional.linear(with_one(read().to(device), linear), change)
            stream.cut = stream.keep(stream.cut().to(device) + repaired)
    return [refit]


def _parallel_(
    chain: BlockChain, block: int, kept: list[Int[Tensor, "_"]], streams: list[Stream], weighted: bool
) -> list[Refit]:
    """Fit the difference that the cut of each of this block's MLPs makes in the dense model."""
    own = chain.of_block[block]
    mlps = chain.mlps[own.start : own.stop]
    sums = [HeldOut(weighted) for _ in mlps]
    rests = [others(chosen, mlp.neurons) for chosen, mlp in zip(kept, mlps, strict=True)]
    removed = [mlp.output.weight[:, rest] for mlp, rest in zip(mlps, rests, strict=True)]
    for stream in streams:
        dense, taps = chain.run(block, stream.dense().to(chain.model.device), stream.calls[block])
        stream.dense = stream.keep(dense)
        for place, tap in enumerate(taps):
            activation, linear = tap.projections[0].input, mlps[place].output
            residual = functional.linear(activation[..., rests[place]], removed[place])
            seen, held = dense, stream.held
            if tap.tokens is not None:  # an expert's: each token by itself
                seen = dense.flatten(0, 1)[tap.tokens, None]
                held = stream.held.repeat_interleave(dense.shape[1])[tap.tokens.cpu()]
                activation, residual = activation.unsqueeze(1), residual.unsqueeze(1)
            sums[place].add(with_one(activation[..., kept[place]], linear), residual, seen, held)
    keep_(mlps, kept)
    refits = []
    for mlp, moments in zip(mlps, sums, strict=True):
        change, refit = moments.refit(mlp.name)
        refits.append(refit)
        if change is not None:
            _add_(mlp.output, change.to(mlp.output.weight))
    return refits


def _reconstruct_(
    chain: BlockChain, block: int, inputs: list[Spilled], streams: list[Stream], training: Training, until: float
) -> Reconstruction:
    """Train this block to turn the cut stream before it into the dense one after it."""
    examples = [
        Example(before, stream.dense, stream.calls[block], stream.held)
        for before, stream in zip(inputs, streams, strict=True)
    ]
    return reconstruct_(chain, block, examples, training, until)


def _pass_cut_stream(chain: BlockChain, block: int, inputs: list[Spilled], streams: list[Stream]) -> None:
    """Move the cut stream through the block as it is now."""
    for stream, before in zip(streams, inputs, strict=True):
        output, _ = chain.run(block, before().to(chain.model.device), stream.calls[block])
        stream.cut = stream.keep(output)


def _pass_dense_stream(chain: BlockChain, block: int, streams: list[Stream]) -> None:
    """Move the dense stream through the block, which is not cut yet."""
    for stream in streams:
        if stream.known is not None:
            output = stream.known[block]
        else:
            output, _ = chain.run(block, stream.dense().to(chain.model.device), stream.calls[block])
        stream.dense = stream.keep(output)


def with_one(activation: Float[Tensor, "*batch kept"], linear: Projection) -> Float[Tensor, "*batch kept_and_one"]:
    """Append a 1 to the input of a projection that has a bias."""
    return activation if linear.bias is None else functional.pad(activation, (0, 1), value=1.0)


def _add_(linear: Projection, change: Float[Tensor, "hidden kept"]) -> None:
    """Add a change to the weight, and its last column to the bias if there is one."""
    linear.weight.add_(change[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.add_(change[:, -1])
