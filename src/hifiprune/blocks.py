"""A causal language model as embedding, decoder blocks and head, run block by block.

Every stage that needs the network's inner values goes through `BlockChain`. The keyword arguments of each block (masks,
rotary embeddings, per-layer variants) are recorded from the model's own forward, so no architecture is written twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.errors import RunError, UserError
from hifiprune.neurons import family_of, find_blocks, find_mlps
from hifiprune.objectives import Head, Kernel, mean_over_positions

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a layer, its activation `h` and `dC/dh`, both `[windows, positions, neurons]`, which it may overwrite."""


@dataclass(frozen=True)
class BlockCall:
    """What the model's own forward passes to one block beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Trace:
    """One block's run: its input and, with the graph between them, its MLP's activation `h` and its output."""

    input: Tensor
    activation: Tensor
    output: Tensor


class BlockChain:
    """Runs `model` block by block; the weights stay where they are and never require grad.

    Raises:
        UserError: the architecture is not supported, or its logits cannot be rebuilt from the final hidden state.
    """

    def __init__(self, model: PreTrainedModel):
        family = family_of(model.config.model_type, [type(model).__name__])
        self.model = model
        self.mlps = find_mlps(model)
        self.blocks = list(find_blocks(model))
        self.norm = model.get_submodule(family.norm)
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

        with _overridden([(block, record) for block in self.blocks]), torch.no_grad():
            self.model.base_model(input_ids=tokens, use_cache=False)
        return inputs[0], calls

    @torch.no_grad()
    def final_hidden(self, tokens: Int[Tensor, "windows positions"]) -> Float[Tensor, "windows positions hidden"]:
        """The final hidden state after the last norm, the input of the head.

        Raises:
            RunError: a block's output is not finite; the error names the block.
        """
        hidden, calls = self.embed(tokens)
        for index, (block, call) in enumerate(zip(self.blocks, calls, strict=True)):
            hidden = block(hidden, *call.args, **call.kwargs)
            if not hidden.isfinite().all():
                raise RunError(
                    f"the activations of decoder block {index} of {len(self.blocks)} are NaN or infinite in "
                    f"{hidden.dtype}; check the checkpoint, or compute in float32 (--dtype float32)"
                )
        normed: Tensor = self.norm(hidden)
        return normed

    def sweep(
        self, tokens: Int[Tensor, "windows positions"], objective: Kernel, visit: Visit, *, recompute: bool = False
    ) -> Float[Tensor, "windows"]:
        """Forward through all blocks, then backward from `objective`, showing `visit` every MLP from last to first.

        Same as `C = objective(logits).mean(-1).sum(); C.backward()` with a hook on every MLP's activation, without
        weight gradients, without the logits as a whole, and with each block's graph freed as soon as it is used.

        Args:
            tokens: token ids.
            objective: the scalar of each position whose mean over a window's positions is differentiated.
            visit: receives `h` and `dC/dh` of a layer.
            recompute: keep only each block's input and its MLP's output, and run the block again for its backward.

        Returns:
            the objective of each window, in float32 or better.
        """
        hidden, calls = self.embed(tokens)
        last = len(self.blocks) - 1
        stored: list[Trace | tuple[Tensor, Tensor]] = []
        for index, call in enumerate(calls):
            if recompute and index < last:
                output, mlp_output = self._run(index, hidden, call)
                stored.append((hidden, mlp_output))
                hidden = output
            else:
                trace = self._trace(index, hidden, call)
                stored.append(trace)
                hidden = trace.output
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self.norm(hidden)
        values, gradient = mean_over_positions(objective, normed.detach(), self.head)
        # float16 holds nothing below 6e-8, so there the small gradients travel scaled by a power of two
        scale = 2**12 if normed.dtype == torch.float16 else 1
        (gradient,) = torch.autograd.grad(normed, hidden, (gradient * scale).to(normed.dtype))
        for index in reversed(range(len(stored))):
            entry = stored.pop()
            if not isinstance(entry, Trace):
                hidden, mlp_output = entry
                entry = self._trace(index, hidden, calls[index], mlp_output)
            wanted = (entry.activation, entry.input) if index else (entry.activation,)
            activation_gradient, *rest = torch.autograd.grad(entry.output, wanted, gradient)
            if scale != 1:
                activation_gradient = activation_gradient.float() / scale
            visit(index, entry.activation.detach(), activation_gradient)
            gradient = rest[0] if rest else gradient
        return values

    @torch.no_grad()
    def _run(self, index: int, hidden: Tensor, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Output of a block and of its MLP's output map."""
        outputs: list[Tensor] = []
        linear = self.mlps[index].output

        def tapped(activation: Tensor) -> Tensor:
            outputs.append(functional.linear(activation, linear.weight, linear.bias))
            return outputs[0]

        with _overridden([(linear, tapped)]):
            output: Tensor = self.blocks[index](hidden, *call.args, **call.kwargs)
        return output, outputs[0]

    def _trace(self, index: int, hidden: Tensor, call: BlockCall, mlp_output: Tensor | None = None) -> Trace:
        """Run a block with its graph; where the output map's product is known, it is not computed again."""
        activations: list[Tensor] = []
        linear = self.mlps[index].output
        hidden = hidden.detach().requires_grad_(index > 0)

        def tapped(activation: Tensor) -> Tensor:
            if not activation.requires_grad:  # the first block: nothing before its activation needs a gradient
                activation = activation.detach().requires_grad_()
            activations.append(activation)
            if mlp_output is None:
                return functional.linear(activation, linear.weight, linear.bias)
            known: Tensor = _KnownProduct.apply(activation, linear.weight, mlp_output)  # type: ignore[no-untyped-call]
            return known

        with _overridden([(linear, tapped)]), torch.enable_grad():
            output = self.blocks[index](hidden, *call.args, **call.kwargs)
        return Trace(hidden, activations[0], output)

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


class _KnownProduct(torch.autograd.Function):
    """`activation @ weight.T + bias` where the result is already known: only the gradient is computed."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, weight: Tensor, product: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None


def check_windows(model: PreTrainedModel, windows: Tensor, batch_size: int, least: int = 1) -> None:
    """Refuse token windows that `model` cannot be run on, or of fewer than `least` positions.

    Raises:
        UserError: the shape, dtype, length or token ids are wrong, or the batch size is.
    """
    config = model.config.get_text_config()
    if windows.ndim != 2 or windows.numel() == 0 or windows.is_floating_point():
        found = f"{windows.dtype} {list(windows.shape)}"
        raise UserError(f"windows must be integer token ids [windows, positions], not {found}")
    longest = getattr(config, "max_position_embeddings", None) or windows.shape[1]
    if not least <= windows.shape[1] <= longest:
        raise UserError(f"windows must have {least} to {longest} positions, not {windows.shape[1]}")
    low, high = int(windows.min()), int(windows.max())
    if not 0 <= low <= high < config.vocab_size:
        raise UserError(f"token ids must lie in 0 to {config.vocab_size - 1}; found {low} to {high}")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")


@contextmanager
def memory_explained(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Turn a device that is out of memory into one message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"not enough memory on {model.device} for {tokens} tokens at once; use a smaller --batch-size or "
            "--seq-len, --dtype bfloat16, or --recompute where it is offered"
        ) from error


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients within; both restored after."""
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _overridden(pairs: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
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
