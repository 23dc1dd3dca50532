"""Independent truth for the criteria: plain transformers, one graph, the formulas as they stand in the papers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.engine.sliced_objective import Kernel, Rows
from hifiprune.models.mlp import Mlp, Projection, find_mlps
from hifiprune.plan import Plan

Loss = Callable[[Tensor, Tensor], Tensor]
"""From one window's logits `[positions, vocabulary]` and tokens to a scalar."""


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def mean_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    probs = logits.softmax(-1)
    return -(probs * probs.log()).sum(-1).mean(-1)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:-1], tokens[1:])


def divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of each position, in nats."""
    log_probs = target_logits.log_softmax(-1)
    return (log_probs.exp() * (log_probs - logits.log_softmax(-1))).sum(-1)


def distillation_loss(teacher: Tensor, alpha: float, temperature: float) -> Loss:
    """The mix of arXiv 2506.11120: the temperature is the teacher's alone, the KL is over all positions."""

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        soft = functional.kl_div(logits.log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean")
        return (1 - alpha) * next_token_loss(logits, tokens) + alpha * soft

    return loss


def labels_loss(labels: Tensor) -> Loss:
    return lambda logits, tokens: functional.cross_entropy(logits, labels)


def drawn_labels(kernel: Kernel, logits: Tensor, window: int = 0) -> Tensor:
    """The labels that a kernel drew for a window, read from its gradient, the probabilities minus one at the label."""
    gradient, positions = logits.detach().clone(), len(logits)
    unused = torch.zeros(positions, dtype=torch.int64)
    kernel(Rows(gradient, unused, torch.ones(positions).to(logits), None, window, 0, positions))
    return (logits.softmax(-1) - gradient).argmax(-1)


@contextmanager
def changed_activations(model: PreTrainedModel, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """The activation of every MLP is within what `change` makes of it and the MLP's number."""
    hooks = []
    experts: dict[Any, int] = {}
    for number, mlp in enumerate(find_mlps(model)):
        module: Any = mlp.output.module
        if mlp.is_expert:
            experts.setdefault(module, number)
        else:
            hooks.append(module.register_forward_pre_hook(lambda _, given, own=number: (change(own, given[0]),)))
    for module, first in experts.items():
        module.forward = partial(every_expert, module, first, change)
    yield
    for hook in hooks:
        hook.remove()
    for module in experts:
        del module.forward


def every_expert(
    module: Any, first: int, change: Callable[[int, Tensor], Tensor], hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Every token through every expert, whose activations weigh nothing where the router did not choose it."""
    share = hidden.new_zeros(len(hidden), len(module.down_proj)).scatter_add(1, chosen, weights.to(hidden.dtype))
    total = torch.zeros_like(hidden)
    for expert, (both, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
        gate, up = (hidden @ both.T).split(len(both) // 2, -1)
        total = total + change(first + expert, module.act_fn(gate) * up * share[:, [expert]]) @ down.T
    return total


@contextmanager
def recorded_activations(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The activation of every MLP, once the model has run within."""
    activations = [torch.empty(0)] * len(find_mlps(model))

    def keep(number: int, activation: Tensor) -> Tensor:
        activations[number] = activation
        return activation

    with changed_activations(model, keep):
        yield activations


def activations_of(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """`[windows, positions, neurons]` of every MLP."""
    with recorded_activations(model) as activations, torch.no_grad():
        logits_of(model, tokens)
    return activations


@contextmanager
def replaced_activation(linear: Projection, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The activation that enters `linear` is changed within."""
    hook = linear.module.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]),))
    yield
    hook.remove()


def masked_logits(model: PreTrainedModel, plan: Plan, tokens: Tensor) -> Tensor:
    """Logits with the activations of all neurons that a plan does not keep set to zero."""
    masks = [
        torch.zeros(mlp.neurons, dtype=model.dtype).index_fill(0, kept, 1)
        for mlp, kept in zip(find_mlps(model), plan.kept, strict=True)
    ]
    with changed_activations(model, lambda number, activation: activation * masks[number]):
        return logits_of(model, tokens)


def taylor_products(model: PreTrainedModel, tokens: Tensor, losses: Sequence[Loss]) -> list[Tensor]:
    """`h * dC/dh` of every MLP, `[windows, positions, neurons]`; one loss a window."""
    found = []
    for window, loss in zip(tokens, losses, strict=True):
        with recorded_activations(model) as activations:
            value = loss(logits_of(model, window[None])[0], window)
        slopes = torch.autograd.grad(value, activations)
        found.append([(h * slope)[0].detach() for h, slope in zip(activations, slopes, strict=True)])
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def weight_products(model: PreTrainedModel, tokens: Tensor, losses: Sequence[Loss]) -> list[Tensor]:
    """`down.T * dC/ddown.T + up * dC/dup + gate * dC/dgate`, `[windows, neurons, hidden]` of every MLP."""
    mlps = find_mlps(model)
    weights = {(each.module, each.weight_name): weight_of(each) for mlp in mlps for each in mlp.projections}
    found = []
    for window, loss in zip(tokens, losses, strict=True):
        value = loss(logits_of(model, window[None])[0], window)
        slopes = torch.autograd.grad(value, list(weights.values()))
        known = {place: weight * slope for (place, weight), slope in zip(weights.items(), slopes, strict=True)}
        found.append([summed(mlp, known) for mlp in mlps])
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def weight_of(linear: Projection) -> Tensor:
    weight: Tensor = getattr(linear.module, linear.weight_name)
    return weight


def summed(mlp: Mlp, products: dict[Any, Tensor]) -> Tensor:
    parts = []
    for each in mlp.projections:
        product = products[each.module, each.weight_name]
        product = product if each.expert is None else product[each.expert]
        parts.append((product.T if each.flipped else product).chunk(each.parts)[each.part])
    parts[-1] = parts[-1].T
    return torch.stack(parts).sum(0).detach()
