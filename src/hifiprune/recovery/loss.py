"""The loss of recovery training: cross-entropy, divergence from the dense model, or both, a slice of tokens at a time.

The model's own forward would compute the logits of all positions, several times `[tokens, vocabulary]`. It is replaced
by one that stops at the final hidden state; the loss and its gradients there and at the head's weight are computed
together, so that logits exist for one slice at a time. Everything happens inside the model's forward, where DDP and
FSDP expect its weights to be used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hifiprune.engine.hooks import overridden
from hifiprune.engine.lm_head import Head, at_least_float32
from hifiprune.engine.products import add_product
from hifiprune.engine.sliced_objective import Rows, through_cap
from hifiprune.recovery.distillation import LikeliestTarget, Target, Teacher, WholeTarget, guided, hidden_states
from hifiprune.scoring.objectives import SoftLabels


@contextmanager
def sliced_loss(
    model: PreTrainedModel, kernel: SoftLabels, teacher: Teacher | None = None, *, match_hidden: float = 0.0
) -> Iterator[None]:
    """Make `model` return only its loss within this context, in the form that transformers' `Trainer` expects.

    In evaluation mode the loss is the cross-entropy, and in place of logits its sum and the number of labels are
    returned for each row, `[rows, 2]`.

    Args:
        model: called with `input_ids`, `position_ids`, `labels`, when several batches make a step with
            `num_items_in_batch`, the number of labels that the sum over tokens is divided by, with `places`, the
            flat indices of tokens before a label, and with what `hifiprune.recovery.distillation.CachedTeacher` adds.
            Without `places` a GPU is asked for them, and waited for.
        kernel: the loss of a token.
        teacher: for a kernel that needs one, where rows do not bring what it would say.
        match_hidden: weight of the squared difference between the model's hidden states and the teacher's, relative to
            the square of the latter, mean over the blocks.
    """
    head = Head.of(model)

    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        places: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        guide_values: Tensor | None = None,
        guide_columns: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        learned = guided(labels)
        places = learned.flatten().nonzero().flatten() if places is None else places
        answers = _rows_at(places, labels.roll(-1, 1))
        every = model.training and match_hidden > 0
        states = [_rows_at(places, each) for each in hidden_states(model, input_ids, position_ids, every=every)]
        hidden = states[-1]
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        if not model.training:
            losses = hidden.new_zeros(learned.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
            parts = [values for *_, values in _slices(hidden.detach(), head, SoftLabels(0.0), answers, None)]
            losses.view(-1).index_copy_(0, places, torch.cat(parts))
            rows = torch.stack((losses.sum(1), learned.sum(1).to(losses)), 1)
            return CausalLMOutput(loss=losses.sum() / count, logits=rows)
        target: Target | None = None
        if guide_values is not None and guide_columns is not None:
            kept = _rows_at(places, guide_values), _rows_at(places, guide_columns)
            target = LikeliestTarget(*kept, kernel.temperature)
        elif teacher:
            wanted = [_rows_at(places, each) for each in teacher.states(input_ids, position_ids, every=every)]
            target = WholeTarget(wanted[-1], Head.of(teacher.model))
        weight, bias = head.linear.weight, head.linear.bias
        total = SlicedLoss.apply(hidden, weight, bias, head, kernel, answers, target)  # type: ignore[no-untyped-call]
        if every:
            total = total + match_hidden * sum(map(relative_difference, states, wanted)) / len(states)
        return CausalLMOutput(loss=total / count)

    forward_: Callable[..., Any] = forward
    with overridden([(model, forward_)]):
        yield


def _rows_at(places: Int[Tensor, "tokens"], values: Tensor) -> Tensor:
    """Return the tokens at these places of all rows."""
    return values.flatten(0, 1).index_select(0, places.to(values.device))


def relative_difference(
    states: Float[Tensor, "tokens hidden"], wanted: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, ""]:
    """Sum over tokens the squared difference of their states relative to the squared target."""
    wanted = at_least_float32(wanted).to(states.device)
    return ((at_least_float32(states) - wanted).square().sum(-1) / wanted.square().sum(-1)).sum()


def _slices(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    kernel: SoftLabels,
    labels: Int[Tensor, "tokens"],
    target: Target | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for each slice of tokens its position, the gradient at its logits, and the kernel's values."""
    ones = hidden.new_ones(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(hidden), head.slice_rows):
        here = slice(start, start + head.slice_rows)
        logits = head.logits(hidden[here])
        wanted = target.logits(here, logits) if target else None
        rows = Rows(logits, labels[here], ones[here], wanted, 0, start, len(hidden))
        values = torch.cat([through_cap(kernel, part, head.cap) for part in rows.split(head.cache_rows)])
        yield here, logits, values


class SlicedLoss(torch.autograd.Function):
    """Sum a kernel's value over tokens, with gradients at the hidden state and at the head.

    Same as `kernel(head.logits(hidden)).sum()` under autograd, with logits of one slice of tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, "vocabulary hidden"],
        bias: Float[Tensor, "vocabulary"] | None,
        head: Head,
        kernel: SoftLabels,
        labels: Int[Tensor, "tokens"],
        target: Target | None,
    ) -> Float[Tensor, ""]:
        """Compute the sum, and the gradients along with it."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        slopes = torch.empty_like(hidden, dtype=dtype)
        steep = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        lean = torch.zeros_like(bias, dtype=dtype) if bias is not None and ctx.needs_input_grad[2] else None
        total = hidden.new_zeros((), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for here, gradient, values in _slices(hidden, head, kernel, labels, target):
                total += values.sum()
                slopes[here] = head.pull_back(gradient)
                if steep is not None:
                    add_product(steep, gradient.T, hidden[here], head.scale)
                if lean is not None:
                    lean.add_(gradient.sum(0), alpha=head.scale)
        ctx.save_for_backward(slopes.to(hidden), *(each for each in (steep, lean) if each is not None))
        ctx.found = (weight.dtype, steep is not None, lean is not None)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients at hidden state, weight and bias."""
        slopes, *rest = ctx.saved_tensors
        dtype, steep, lean = ctx.found
        scaled = [(each * gradients[0]).to(dtype) for each in rest]
        weight = scaled.pop(0) if steep else None
        bias = scaled.pop(0) if lean else None
        return slopes * gradients[0].to(slopes), weight, bias, None, None, None, None
