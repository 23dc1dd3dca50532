"""A causal language model as embedding, decoder blocks and head, run block by block.

Every stage that needs the network's inner values goes through `BlockChain`. The keyword arguments of each block (masks,
rotary embeddings, per-layer variants) are recorded from the model's own forward, so no architecture is written twice.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.errors import RunError, UserError
from hifiprune.head import Head
from hifiprune.neurons import family_of, find_blocks, find_mlps
from hifiprune.objectives import Kernel, mean_over_positions
from hifiprune.taps import BlockCall, KnownProduct, MapPass, Seen, Trace, Visit, grown, overridden, without


class BlockChain:
    """Runs `model` block by block; the weights stay where they are and never require grad.

    Raises:
        UserError: the architecture is not supported, or its logits cannot be rebuilt from the final hidden state.
    """

    def __init__(self, model: PreTrainedModel):
        self.family = family_of(model.config.model_type, [type(model).__name__])
        self.model = model
        self.mlps = find_mlps(model)
        self.blocks = list(find_blocks(model))
        self.norm = model.get_submodule(self.family.norm)
        self.head = Head.of(model)
        self._check_head()

    def embed(self, tokens: Int[Tensor, "windows positions"]) -> tuple[Tensor, list[BlockCall]]:
        """The first block's input, and the call of every block, as the model's own forward makes them."""
        calls: list[BlockCall] = []
        inputs: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            inputs.append(hidden)
            calls.append(BlockCall(args, kwargs))
            return hidden

        with overridden([(block, record) for block in self.blocks]), torch.no_grad():
            self.model.base_model(input_ids=tokens, use_cache=False)
        return inputs[0], calls

    def final_hidden(self, tokens: Int[Tensor, "windows positions"]) -> Float[Tensor, "windows positions hidden"]:
        """The final hidden state after the last norm, the input of the head.

        Raises:
            RunError: a block's output is not finite; the error names the block.
        """
        return self.run_from(0, *self.embed(tokens))

    @torch.no_grad()
    def run_from(
        self,
        first: int,
        hidden: Float[Tensor, "windows positions hidden"],
        calls: Sequence[BlockCall],
        *,
        removed: Int[Tensor, "_"] | None = None,
        inputs: dict[int, Tensor] | None = None,
        check_each: bool = False,
    ) -> Float[Tensor, "windows positions hidden"]:
        """The same from the input of block `first` on.

        Args:
            first: number of the block.
            hidden: its input.
            calls: of all blocks, from `embed`.
            removed: neurons of its MLP whose activations are set to zero.
            inputs: receives the input of every block.
            check_each: look for NaN and infinity after every block instead of at the end.
        """
        start = hidden
        for index in range(first, len(self.blocks)):
            if inputs is not None:
                inputs[index] = hidden
            gone = removed if index == first else None
            with overridden([(self.mlps[index].output, partial(without, self.mlps[index].output, gone))]):
                hidden = self.blocks[index](hidden, *calls[index].args, **calls[index].kwargs)
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
        visit: Visit,
        *,
        recompute: bool = False,
        maps: Sequence[int] = (),
        teacher: Float[Tensor, "windows positions hidden"] | None = None,
        first_window: int = 0,
    ) -> tuple[list[Float[Tensor, "windows"]], Float[Tensor, "windows positions hidden"]]:
        """Forward through all blocks, then backward from each objective, showing `visit` every MLP.

        Same as `C = objective(logits).mean(-1).sum(); C.backward()` with a hook on every MLP's activation, without
        weight gradients, without the logits as a whole, and with each block's graph freed as soon as it is used. One
        forward serves all objectives.

        Args:
            tokens: token ids.
            kernels: the scalars of each position whose means over a window's positions are differentiated; none for a
                forward pass alone.
            visit: sees every MLP on the way forward, first to last, and on the way back, last to first, once a kernel.
            recompute: keep only each block's input and its MLP's output, and run the block again for its backward.
            maps: numbers of the kernels for which `visit` is shown the linear maps too.
            teacher: the teacher's final hidden state, for kernels that need one.
            first_window: number of the first window.

        Returns:
            each objective of each window, in float32 or better, and the final hidden state after the last norm.
        """
        hidden, calls = self.embed(tokens)
        last = len(self.blocks) - 1
        stored: list[Trace | tuple[Tensor, Tensor]] = []
        for index, call in enumerate(calls):
            if kernels and not (recompute and index < last):
                trace = self._trace(index, hidden, call, maps=bool(maps))
                stored.append(trace)
                activation, hidden = trace.maps[-1].input.detach(), trace.output
            else:
                output, down = self.run(index, hidden, call)
                if kernels:
                    stored.append((hidden, down.output))
                activation, hidden = down.input, output
            visit(Seen(index, None, activation))
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self.norm(hidden)
        final = normed.detach()
        means = mean_over_positions(kernels, final, self.head, tokens, teacher=teacher, first_window=first_window)
        # float16 holds nothing below 6e-8, so there the small gradients travel scaled by a power of two
        scale = 2**12 if normed.dtype == torch.float16 else 1
        gradients = [
            torch.autograd.grad(normed, hidden, (gradient * scale).to(normed.dtype), retain_graph=True)[0]
            for _, gradient in means
        ]
        while stored:
            index = len(stored) - 1
            entry = stored.pop()
            if not isinstance(entry, Trace):
                entry = self._trace(index, entry[0], calls[index], entry[1], maps=bool(maps))
            for number in range(len(kernels)):
                seen = Seen(index, number, entry.maps[-1].input.detach())
                more = number < len(kernels) - 1
                gradients[number] = self._back(
                    entry, gradients[number], seen, maps=number in maps, scale=scale, more=more
                )
                visit(seen)
        return [values for values, _ in means], final

    def _back(self, trace: Trace, gradient: Tensor, seen: Seen, *, maps: bool, scale: int, more: bool) -> Tensor:
        """Fill `seen` with one objective's gradients in a block; return the gradient at the block's input.

        The graph stays if there are `more` objectives.
        """
        outputs = [each.output for each in trace.maps] if maps else []
        inputs = [trace.input] if seen.layer else []
        wanted = [trace.maps[-1].input, *outputs, *inputs]
        found = [*torch.autograd.grad(trace.output, wanted, gradient, retain_graph=more)]
        rest = found.pop() if inputs else gradient
        if scale != 1:
            found = [each.float() / scale for each in found]
        seen.gradient = found[0]
        seen.maps = [
            MapPass(each.linear, each.input.detach(), slope) for each, slope in zip(trace.maps, found[1:], strict=False)
        ]
        return rest

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, call: BlockCall) -> tuple[Tensor, MapPass]:
        """Output of a block, and its MLP's output map."""
        passes: list[MapPass] = []
        linear = self.mlps[index].output

        def tapped(activation: Tensor) -> Tensor:
            passes.append(MapPass(linear, activation, functional.linear(activation, linear.weight, linear.bias)))
            return passes[0].output

        with overridden([(linear, tapped)]):
            output: Tensor = self.blocks[index](hidden, *call.args, **call.kwargs)
        return output, passes[0]

    def _trace(
        self, index: int, hidden: Tensor, call: BlockCall, mlp_output: Tensor | None = None, *, maps: bool = False
    ) -> Trace:
        """Run a block with its graph; where the output map's product is known, it is not computed again."""
        passes: list[MapPass] = []
        mlp = self.mlps[index]
        hidden = hidden.detach().requires_grad_(index > 0)

        def tapped(linear: nn.Linear, activation: Tensor) -> Tensor:
            known = mlp_output if linear is mlp.output else None
            if linear is mlp.output:
                activation = grown(activation)
            if known is None:
                output = functional.linear(activation, linear.weight, linear.bias)
            else:
                output = KnownProduct.apply(activation, linear.weight, known)  # type: ignore[no-untyped-call]
            passes.append(MapPass(linear, activation, grown(output)))
            return passes[-1].output

        linears = (*mlp.inputs, mlp.output) if maps else (mlp.output,)
        with overridden([(linear, partial(tapped, linear)) for linear in linears]), torch.enable_grad():
            output = self.blocks[index](hidden, *call.args, **call.kwargs)
        return Trace(hidden, passes, output)

    def _check_head(self) -> None:
        """Prove on a few tokens that the logits follow from the final hidden state as `Head` says."""
        tokens = torch.arange(8, device=self.model.device).unsqueeze(0) % self.head.vocabulary
        ours = self.head.logits(self.final_hidden(tokens)[0])
        with torch.no_grad():
            theirs = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        if not theirs.isfinite().all():
            raise RunError(f"the logits of {type(self.model).__name__} are NaN or infinite; check the checkpoint")
        error = (ours - theirs).abs().max().item()
        size = theirs.abs().max().item()
        if not error <= 0.02 * size + 1e-4:
            raise UserError(
                f"the logits of {type(self.model).__name__} cannot be rebuilt from its final hidden state: error "
                f"{error:.3g} where logits reach {size:.3g}; its head has a step that hifiprune does not know"
            )
