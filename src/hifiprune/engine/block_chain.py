"""A causal language model as embedding, decoder blocks and head, run block by block.

Every stage that needs the network's inner values goes through `BlockChain`. The keyword arguments of each block (masks,
rotary embeddings, per-layer variants) are recorded from the model's own forward, so no architecture is written twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.engine.batch import Batch
from hifiprune.engine.hooks import (
    ActivationHook,
    Activations,
    BlockCall,
    KnownProduct,
    MlpPass,
    ProjectionPass,
    Trace,
    overridden,
    overrides_on,
    requiring_grad,
)
from hifiprune.engine.lm_head import Head
from hifiprune.engine.offload import embedding_rows_loaded, offload_of, walk
from hifiprune.engine.sliced_objective import Kernel, mean_over_positions
from hifiprune.engine.spill import spill
from hifiprune.errors import RunError
from hifiprune.models.families import Family
from hifiprune.models.mlp import Mlp, Projection, by_block, find_blocks, find_mlps, find_norm


class BlockChain:
    """Runs `model` block by block; weights stay where they are, in memory or on disk, and never require grad.

    `engine.verify.verified_chain` builds one and checks on the model's weights that it computes what the model does.
    """

    def __init__(self, model: PreTrainedModel, family: Family):
        self.family = family
        self.model = model
        self.shelf = offload_of(model)
        self.scratch = self.shelf.scratch if self.shelf else None
        self.mlps = find_mlps(model)
        self.of_block = by_block(self.mlps)
        self.blocks = list(find_blocks(model))
        self.norm = find_norm(model)
        self.head = Head.of(model)

    def embed(self, tokens: Int[Tensor, "windows positions"]) -> tuple[Tensor, list[BlockCall]]:
        """Run the model's own forward with recorders for blocks; return the first block's input and all calls."""
        calls: list[BlockCall] = []
        inputs: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs.append(hidden)
            calls.append(BlockCall(args, kwargs))
            return (hidden,) if self.family.returns_tuple else hidden

        hooked = overridden([(block, record) for block in self.blocks])
        with hooked, torch.no_grad(), embedding_rows_loaded(self.model, tokens) as numbers:
            self.model.base_model(input_ids=numbers, use_cache=False)
        return inputs[0], calls

    def final_hidden(self, tokens: Int[Tensor, "windows positions"]) -> Float[Tensor, "windows positions hidden"]:
        """Return the final hidden state after the last norm, which is the input of the head.

        Raises:
            RunError: a block's output is not finite; the error names the block.
        """
        return self.run_from(0, *self.embed(tokens))

    def final_states(
        self, batches: Sequence[Int[Tensor, "windows positions"]]
    ) -> list[Float[Tensor, "windows positions hidden"]]:
        """Return the final hidden states of several batches, which take turns at each block."""
        moving = [Batch(tokens) for tokens in batches]
        self.sweep_all(moving, [], lambda seen: None)
        return [
            batch.final if batch.final.isfinite().all() else self.final_hidden(batch.tokens)  # which names the block
            for batch in moving
        ]

    @torch.no_grad()
    def run_from(
        self,
        first: int,
        hidden: Float[Tensor, "windows positions hidden"],
        calls: Sequence[BlockCall],
        *,
        removed: tuple[int, Int[Tensor, "_"]] | None = None,
        inputs: dict[int, Tensor] | None = None,
        check_each: bool = False,
    ) -> Float[Tensor, "windows positions hidden"]:
        """Return the final hidden state after the last norm, given the input of block `first`.

        Args:
            first: index of the first block to run.
            hidden: its input.
            calls: the arguments of all blocks, from `embed`.
            removed: index of an MLP, and the neurons whose activations are set to zero.
            inputs: if given, receives the input of every block.
            check_each: check for NaN and infinity after every block instead of at the end.
        """
        start = hidden

        def write(number: int, activation: Tensor, tokens: Tensor | None) -> Tensor:
            if removed and number == removed[0]:
                activation = activation.index_fill(-1, removed[1], 0)
            return self.mlps[number].output(activation)

        for index in walk(self.model, range(first, len(self.blocks))):
            if inputs is not None:
                inputs[index] = hidden
            with overridden(overrides_on(self._mlps(index), self.of_block[index].start, hidden, write)):
                hidden = self.run_block(index, hidden, calls[index])
            if check_each and not hidden.isfinite().all():
                raise RunError(
                    f"the activations of decoder block {index} of {len(self.blocks)} are NaN or infinite in "
                    f"{hidden.dtype}; check the checkpoint, or compute in float32 (--dtype float32)"
                )
        if not check_each and not hidden.isfinite().all():  # asked once: it makes a GPU wait
            return self.run_from(first, start, calls, removed=removed, check_each=True)
        normed: Tensor = self.norm(hidden)
        return normed

    def sweep(
        self,
        tokens: Int[Tensor, "windows positions"],
        kernels: Sequence[Kernel],
        visit: ActivationHook,
        *,
        recompute: bool = False,
        projections: Sequence[int] = (),
        teacher: Float[Tensor, "windows positions hidden"] | None = None,
        first_window: int = 0,
    ) -> tuple[list[Float[Tensor, "windows"]], Float[Tensor, "windows positions hidden"]]:
        """Run forward through all blocks, then backward from each objective, and call `visit` for every MLP.

        Same as `C = objective(logits).mean(-1).sum(); C.backward()` with a hook on every MLP's activation, without
        weight gradients, without the logits as a whole, and with each block's graph freed as soon as it is used. One
        forward serves all objectives.

        Args:
            tokens: token ids.
            kernels: objectives per position, whose means over a window's positions are differentiated; empty for a
                forward pass alone.
            visit: called for every MLP in the forward pass, first to last, and in the backward pass, last to first,
                once a kernel.
            recompute: keep only each block's input and its MLP's output, and run the block again for its backward.
            projections: indices of the kernels for which `visit` receives the projections too.
            teacher: the teacher's final hidden state, for kernels that need one.
            first_window: index of the first window.

        Returns:
            every objective for every window, in float32 or better, and the final hidden state after the last norm.
        """
        batch = Batch(tokens, first_window, teacher)
        self.sweep_all([batch], kernels, visit, recompute=recompute, projections=projections)
        return batch.values, batch.final

    def sweep_all(
        self,
        batches: Sequence[Batch],
        kernels: Sequence[Kernel],
        visit: ActivationHook,
        *,
        recompute: bool = False,
        kept: int = 1,
        projections: Sequence[int] = (),
    ) -> None:
        """Sweep several batches, all of which go through a block before the next block runs.

        Weights on disk are then read once for all batches, and only a block's input is kept. With weights in memory one
        batch at a time needs the least memory. Where blocks are recomputed, the last `kept` are not: their graphs are
        used first.
        """
        last = len(self.blocks) - 1
        for batch in batches:
            batch.hidden, batch.calls = self.embed(batch.tokens)
        for index in walk(self.model, range(len(self.blocks))):
            whole = bool(kernels) and not self.shelf and not (recompute and index <= last - kept)
            for batch in batches:
                state = batch.hidden
                for each in self._forwards(
                    index, batch, whole=whole, keep=bool(kernels), projections=bool(projections)
                ):
                    visit(Activations(each.number, None, each.activation(state), windows=batch.first_window))
        self._turn(batches, kernels)
        for index in walk(self.model, range(last, -1, -1) if kernels else ()):
            for batch in batches:
                self._backwards(index, batch, visit, projections)

    def _forwards(self, index: int, batch: Batch, *, whole: bool, keep: bool, projections: bool) -> list[MlpPass]:
        """Run a block and keep its whole graph, its input, or nothing; return its MLPs."""
        call = batch.calls[index]
        if whole:
            trace = self._trace(index, batch.hidden, call, projections=projections)
            batch.stored.append(trace)
            batch.hidden = trace.output
            return trace.mlps
        output, mlps = self.run(index, batch.hidden, call)
        if keep:
            products = [each.projections[-1].output for each in mlps]
            changed = any(each._version > 0 for each in products)  # Falcon adds to it in place, what attention gives
            known = None if self.shelf or changed or len(products) > 1 else products[0]
            batch.stored.append((spill(self.scratch, batch.hidden), known))
        batch.hidden = output
        return mlps

    def _turn(self, batches: Sequence[Batch], kernels: Sequence[Kernel]) -> None:
        """Evaluate the objectives after the last block, and their gradients there."""
        head = self.head.at_hand() if kernels else self.head
        for batch in batches:
            hidden = batch.hidden.detach().requires_grad_()
            with torch.enable_grad():
                normed = self.norm(hidden)
            batch.final = normed.detach()
            means = mean_over_positions(
                kernels, batch.final, head, batch.tokens, teacher=batch.teacher, first_window=batch.first_window
            )
            batch.values = [values for values, _ in means]
            batch.gradients = [
                torch.autograd.grad(normed, hidden, (slope * scale_in(normed)).to(normed.dtype), retain_graph=True)[0]
                for _, slope in means
            ]

    def _backwards(self, index: int, batch: Batch, visit: ActivationHook, projections: Sequence[int]) -> None:
        """Propagate the gradient of every objective through a block, and free the block's graph."""
        entry, count = batch.stored.pop(), len(batch.gradients)
        if not isinstance(entry, Trace):
            entry = self._trace(index, entry[0](), batch.calls[index], entry[1], projections=bool(projections))
        for number, gradient in enumerate(batch.gradients):
            shown, more = number in projections, number < count - 1
            batch.gradients[number], mlps = self._back(entry, gradient, index > 0, projections=shown, more=more)
            for each, (slope, slopes) in zip(entry.mlps, mlps, strict=True):
                own = [
                    ProjectionPass(
                        one.linear, each.spread(one.input.detach(), entry.input), each.spread(at, entry.input)
                    )
                    for one, at in zip(each.projections, slopes, strict=False)
                ]
                activation, spread = each.activation(entry.input), each.spread(slope, entry.input)
                visit(Activations(each.number, number, activation, spread, own, batch.first_window))

    def _back(
        self, trace: Trace, gradient: Tensor, further: bool, *, projections: bool, more: bool
    ) -> tuple[Tensor, list[tuple[Tensor, list[Tensor]]]]:
        """Return one objective's gradient at a block's input, and those at each MLP's activation and projections.

        The graph is kept if `more` objectives follow.
        """
        wanted = [each.projections[-1].input for each in trace.mlps]
        behind = [[one.output for one in each.projections] if projections else [] for each in trace.mlps]
        inputs = [trace.input] if further else []
        flat = [output for outputs in behind for output in outputs]
        found = [*torch.autograd.grad(trace.output, [*wanted, *flat, *inputs], gradient, retain_graph=more)]
        rest = found.pop() if inputs else gradient
        if (scale := scale_in(gradient)) != 1:
            found = [each.float() / scale for each in found]
        late = iter(found[len(wanted) :])
        return rest, [(slope, [next(late) for _ in outputs]) for slope, outputs in zip(found, behind, strict=False)]

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, call: BlockCall) -> tuple[Tensor, list[MlpPass]]:
        """Run a block; return its output, and the inputs and outputs of its MLPs' output projections."""
        passes: list[MlpPass] = []

        def write(number: int, activation: Tensor, tokens: Tensor | None) -> Tensor:
            linear = self.mlps[number].output
            passes.append(MlpPass(number, [ProjectionPass(linear, activation, linear(activation))], tokens))
            return passes[-1].projections[-1].output

        with overridden(overrides_on(self._mlps(index), self.of_block[index].start, hidden, write)):
            output = self.run_block(index, hidden, call)
        return output, sorted(passes, key=lambda each: each.number)

    def _mlps(self, index: int) -> list[Mlp]:
        """Return the MLPs of a block."""
        own = self.of_block[index]
        return self.mlps[own.start : own.stop]

    def run_block(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Run a block's modules as they are now; return its output."""
        output = self.blocks[index](hidden, *call.args, **call.kwargs)
        state: Tensor = output[0] if self.family.returns_tuple else output
        return state

    def _trace(
        self,
        index: int,
        hidden: Tensor,
        call: BlockCall,
        mlp_output: Tensor | None = None,
        *,
        projections: bool = False,
    ) -> Trace:
        """Run a block with its graph; where the output projection's product is known, it is not computed again."""
        own = self.of_block[index]
        passes = {number: MlpPass(number, []) for number in own}
        hidden = hidden.detach().requires_grad_(index > 0)

        def read(number: int, linears: Sequence[Projection], values: Tensor) -> Tensor:
            found = [ProjectionPass(linear, values, requiring_grad(linear(values))) for linear in linears]
            passes[number].projections += found
            return found[0].output if len(found) == 1 else torch.cat([each.output for each in found], -1)

        def write(number: int, activation: Tensor, tokens: Tensor | None) -> Tensor:
            activation, linear = requiring_grad(activation), self.mlps[number].output
            if mlp_output is None:
                output = linear(activation)
            else:
                output = KnownProduct.apply(activation, linear.weight, mlp_output)  # type: ignore[no-untyped-call]
            passes[number].tokens = tokens
            shown = output if projections else output.new_empty(0)  # or its memory would be held for nothing
            passes[number].projections.append(ProjectionPass(linear, activation, shown))
            return output

        taps = overrides_on(self._mlps(index), own.start, hidden, write, read if projections else None)
        with overridden(taps), torch.enable_grad():
            output = self.run_block(index, hidden, call)
        return Trace(hidden, [*passes.values()], output)


def scale_in(tensor: Tensor) -> int:
    """Return the factor that keeps gradients representable: float16 holds nothing below 6e-8."""
    return 2**12 if tensor.dtype == torch.float16 else 1
