"""Independent truth for the criteria: plain transformers, one graph, the formulas as they stand in the papers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune import find_mlps
from hifiprune.neurons import LinearMap, Mlp
from hifiprune.objectives import Kernel, Rows
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
def recorded_activations(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The activation of every MLP in layer order, once the model has run within."""
    activations: list[Tensor] = []
    hooks = [
        mlp.output.module.register_forward_pre_hook(lambda _, arguments: activations.append(arguments[0]))
        for mlp in find_mlps(model)
    ]
    yield activations
    for hook in hooks:
        hook.remove()


def activations_of(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """`[windows, positions, neurons]` of every MLP."""
    with recorded_activations(model) as activations, torch.no_grad():
        logits_of(model, tokens)
    return activations


@contextmanager
def replaced_activation(linear: LinearMap, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The activation that enters `linear` is changed within."""
    hook = linear.module.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]),))
    yield
    hook.remove()


def masked_logits(model: PreTrainedModel, plan: Plan, tokens: Tensor) -> Tensor:
    """Logits with the activations of all neurons that a plan does not keep set to zero."""
    with ExitStack() as stack:
        for mlp, kept in zip(find_mlps(model), plan.kept, strict=True):
            mask = torch.zeros(mlp.neurons, dtype=model.dtype).index_fill(0, kept, 1)
            stack.enter_context(replaced_activation(mlp.output, mask.mul))
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


def summed(mlp: Mlp, products: dict[nn.Module, Tensor]) -> Tensor:
    parts = [products[mlp.output.module].T if not mlp.output.flipped else products[mlp.output.module]]
    for each in mlp.inputs:
        product = products[each.module].T if each.flipped else products[each.module]
        parts.append(product.chunk(each.parts)[each.part])
    return torch.stack(parts).sum(0).detach()


def weight_products(model: PreTrainedModel, tokens: Tensor, losses: Sequence[Loss]) -> list[Tensor]:
    """`down.T * dC/ddown.T + up * dC/dup + gate * dC/dgate`, `[windows, neurons, hidden]` of every MLP."""
    mlps = find_mlps(model)
    modules: list[Any] = [*dict.fromkeys(each.module for mlp in mlps for each in mlp.maps)]
    found = []
    for window, loss in zip(tokens, losses, strict=True):
        value = loss(logits_of(model, window[None])[0], window)
        slopes = torch.autograd.grad(value, [module.weight for module in modules])
        products = {module: module.weight * slope for module, slope in zip(modules, slopes, strict=True)}
        found.append([summed(mlp, products) for mlp in mlps])
    return [torch.stack(layer) for layer in zip(*found, strict=True)]
