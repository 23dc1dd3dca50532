"""Reconstruct cut blocks by training: each learns to continue the cut stream as the dense model continues its own.

The ridge refits one matrix. What a narrower MLP can still compute through its nonlinearity is found by training all of
its projections, and the norms of the block, to minimize

    mean over tokens of  |block(x) - y|^2 / |y|^2

where `x` is the residual stream of the cut model before the block and `y` that of the dense model after it. One block
is trained at a time, so memory holds one block and its optimizer; where the MLP and its norm are all that follows
attention, attention is run once and only what follows it is trained. The state with the least error on held-out windows
stays, or the block as it was if none is better. Block by block reconstruction is compared with training end to end in
arXiv 2510.14444, and used for distillation in arXiv 2411.19146.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import cos, inf, pi
from time import monotonic
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hifiprune.defaults import REPAIR_STEPS
from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.hooks import BlockCall
from hifiprune.engine.lm_head import at_least_float32
from hifiprune.engine.spill import Spilled, spill
from hifiprune.errors import RunError
from hifiprune.models.mlp import Mlp
from hifiprune.results import Reconstruction

WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""
BETAS = (0.9, 0.95)
LOOKS = 12
"""How often the held-out error is measured."""
PATIENCE = 3
"""Looks without a smaller error after which a block is done."""


@dataclass(frozen=True)
class Training:
    """How blocks are trained.

    Attributes:
        steps: optimizer steps of each block.
        learning_rate: the highest; it falls to zero along a cosine.
        tokens: tokens of a step, at least those of one batch.
        whole: train attention too, not only the MLP and the norms.
        seed: of the order of the windows.
        minutes: most time for all blocks, each of which may take its share of what is left.
    """

    steps: int = REPAIR_STEPS
    learning_rate: float = 3e-4
    tokens: int = 8192
    whole: bool = False
    seed: int = 0
    minutes: float | None = None

    def share(self, start: float, blocks: int) -> float:
        """Return when the next of so many blocks must be done, on the monotonic clock, if all began at `start`."""
        if self.minutes is None:
            return inf
        now = monotonic()
        return now + max(0.0, start + 60 * self.minutes - now) / blocks

    def batches_of(self, batches: int, tokens: int) -> int:
        """Return how many of all `batches`, each of `tokens` tokens, make a step."""
        return min(batches, max(1, round(self.tokens / tokens)))


@dataclass(frozen=True)
class Example:
    """A batch of windows at one block.

    Attributes:
        input: residual stream of the cut model before the block, `[windows, positions, hidden]`.
        target: residual stream of the dense model after it.
        call: the block's other arguments.
        held: mask of held-out windows.
    """

    input: Spilled
    target: Spilled
    call: BlockCall
    held: Tensor


Run = Callable[[Tensor, BlockCall], Tensor]
"""Computes a block's output, `[windows, positions, hidden]`, from an example's input."""


def reconstruct_(
    chain: BlockChain, index: int, examples: Sequence[Example], training: Training, until: float = inf
) -> Reconstruction:
    """Train a block toward the dense stream; keep the state with the least held-out error.

    Training ends early where that error has not fallen for a while, and at `until` on the monotonic clock.

    Raises:
        RunError: the error is not finite.
    """
    block, name = chain.blocks[index], f"{chain.family.blocks}.{index}"
    own = chain.of_block[index]
    trained = trained_parameters(block, chain.mlps[own.start : own.stop], whole=training.whole)
    run: Run = partial(chain.run_block, index)
    if not training.whole and (tail := find_tail(chain, index, examples[0])):
        run, examples = tail, tail.examples(chain, index, examples)
        behind = {id(parameter) for module in (tail.norm, tail.mlp) for parameter in module.parameters()}
        trained = {name: parameter for name, parameter in trained.items() if id(parameter) in behind}
    parameters = list(trained.values())
    dtype = parameters[0].dtype
    start = [parameter.detach().clone() for parameter in parameters]
    first = best = held_out_error(chain, run, examples, dtype)
    if not torch.isfinite(torch.tensor(first)):
        raise RunError(f"activations of {name} are not finite; check the checkpoint, or compute in --dtype float32")
    state, best_step, looks = start, 0, 0
    block.to(wide := torch.promote_types(dtype, torch.float32))
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=BETAS, weight_decay=0.0)
    steps = training.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARMUP * steps)) * (0.5 + 0.5 * cos(pi * step / steps))
    )
    batches = _batches(examples, training)
    for step in range(1, steps + 1):
        _backward(chain, run, next(batches), wide)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        over = monotonic() >= until
        if step % max(1, steps // LOOKS) == 0 or step == steps or over:
            error = held_out_error(chain, run, examples, wide)
            looks += 1
            if error < best:
                best, best_step, looks = error, step, 0
                state = [parameter.detach().clone() for parameter in parameters]
        if over or looks == PATIENCE:
            break
    for parameter in parameters:
        parameter.requires_grad_(False)
    block.to(dtype)
    _load_(parameters, state)
    if best_step and dtype.itemsize < 4:  # what is kept is rounded
        best = held_out_error(chain, run, examples, dtype)
    if not best < first:
        _load_(parameters, start)
        return Reconstruction(name, first, first, 0)
    return Reconstruction(name, first, best, best_step)


def trained_parameters(block: nn.Module, mlps: Sequence[Mlp], *, whole: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that are trained, by name: those of its MLPs and norms, or all."""
    projections = {id(values) for mlp in mlps for each in mlp.projections for values in each.parameters().values()}
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if whole or id(parameter) in projections or parameter.ndim == 1
    }


@dataclass(frozen=True)
class Tail:
    """The part of a block that follows attention: `x + mlp(norm(x))`."""

    norm: nn.Module
    mlp: nn.Module

    def __call__(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """Return the block's output, given the stream after attention."""
        output: Tensor = hidden + self.mlp(self.norm(hidden))
        return output

    @torch.no_grad()
    def examples(self, chain: BlockChain, index: int, examples: Sequence[Example]) -> list[Example]:
        """Return the same examples with the stream after attention as input."""
        inputs: list[Tensor] = []
        handle = self.norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        made = []
        for example in examples:
            chain.run_block(index, example.input().to(chain.model.device), example.call)
            made.append(replace(example, input=spill(chain.scratch, inputs.pop().cpu())))
        handle.remove()
        return made


@torch.no_grad()
def find_tail(chain: BlockChain, index: int, example: Example) -> Tail | None:
    """Return what follows attention in a block, if it computes exactly what the block does; None elsewhere."""
    if chain.family.experts:
        return None
    block, own = chain.blocks[index], chain.of_block[index]
    mlp = chain.model.get_submodule(chain.mlps[own.start].name)
    calls: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, inputs: Any, result: Any) -> None:
        keeps = module is mlp and torch.is_tensor(result)  # Falcon adds to it in place, what attention gives
        calls.append((module, inputs, result.clone() if keeps else result))

    watched = [module for module in block.modules() if module is mlp or _is_norm(module)]
    handles = [module.register_forward_hook(record) for module in watched]
    output = chain.run_block(index, example.input().to(chain.model.device), example.call)
    for handle in handles:
        handle.remove()
    for _, inputs, added in (called for called in calls if called[0] is mlp and mlp is not block):
        for norm, before, normed in calls:
            if inputs and normed is inputs[0] and torch.is_tensor(added) and torch.equal(before[0] + added, output):
                return Tail(norm, mlp)
    return None


def _is_norm(module: nn.Module) -> bool:
    """Return whether all weights of a module are vectors."""
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


@torch.no_grad()
def held_out_error(chain: BlockChain, run: Run, examples: Sequence[Example], dtype: torch.dtype) -> float:
    """Return the mean relative squared error on the held-out windows, from inputs in `dtype`."""
    total, windows = 0.0, 0
    for example in examples:
        if example.held.any():
            errors = _errors(chain, run, example, dtype)
            total += float(errors[example.held.to(errors.device)].double().sum())
            windows += int(example.held.sum())
    return total / windows


def _errors(chain: BlockChain, run: Run, example: Example, dtype: torch.dtype) -> Float[Tensor, "windows"]:
    """Return the mean over tokens of the relative squared error, for every window."""
    device = chain.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=chain.model.dtype == torch.bfloat16):
        output = run(example.input().to(device, dtype), example.call)
    output, target = at_least_float32(output), at_least_float32(example.target().to(device))
    size = target.square().sum(-1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((output - target).square().sum(-1) / size).mean(-1)


def _backward(chain: BlockChain, run: Run, examples: Sequence[Example], dtype: torch.dtype) -> None:
    """Accumulate the gradients of the mean error over the fitted windows of some examples."""
    windows = sum(int((~example.held).sum()) for example in examples)
    for example in examples:
        with torch.enable_grad():
            errors = _errors(chain, run, example, dtype)
            (errors[~example.held.to(errors.device)].sum() / windows).backward()


def _batches(examples: Sequence[Example], training: Training) -> Iterator[list[Example]]:
    """Yield the examples of every step, without end: each is seen once before any is seen again."""
    fitted = [example for example in examples if not example.held.all()]
    chance = torch.Generator().manual_seed(training.seed)
    size = training.batches_of(len(fitted), fitted[0].input().shape[:2].numel())
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(len(fitted), generator=chance).tolist()
        yield [fitted[number] for number in queue[:size]]
        queue = queue[size:]


@torch.no_grad()
def _load_(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set parameters to values, rounded to their dtype."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
