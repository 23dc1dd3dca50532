"""Perplexity of a model on a text, and the fidelity of its predictions to the dense model's.

Logits of both models are computed a slice of positions at a time, so that whole `[positions, vocabulary]` matrices
never exist. Distributions are float32, sums over positions float64.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.engine.context import check_windows, frozen, memory_explained
from hifiprune.engine.lm_head import Head
from hifiprune.engine.memory import group_of
from hifiprune.engine.verify import verified_chain
from hifiprune.errors import UserError
from hifiprune.evaluation.bootstrap import bootstrap_mean
from hifiprune.progress import track
from hifiprune.results import Estimate

LogProbs = Float[Tensor, "rows vocabulary"]

METRICS = {
    "perplexity": ("perplexity", "exp of the mean cross-entropy of the next token"),
    "dense_perplexity": ("perplexity of the dense model", "the same of the dense model on the same windows"),
    "kl": ("KL divergence, nats", "KL(dense || pruned), 0 for identical models"),
    "js_distance": ("Jensen-Shannon distance", "square root of the divergence in bits: 0 identical, 1 disjoint"),
    "top1_agreement": ("top-1 agreement", "share of positions with the same most likely token, 1 for identical models"),
    "top5_jaccard": ("top-5 Jaccard similarity", "shared part of the 5 most likely tokens, 1 for identical models"),
    "top15_jaccard": ("top-15 Jaccard similarity", "shared part of the 15 most likely tokens, 1 for identical models"),
    "entropy": ("output entropy, nats", "mean entropy of the output distribution"),
    "entropy_shift": ("entropy shift, nats", "entropy of the pruned minus that of the dense model"),
}
"""Label and definition of every metric."""


@dataclass(frozen=True)
class Reference:
    """The reference of fidelity: a dense model's final hidden states on the windows, and its head.

    With it, the dense model need not be loaded or run again while other models are measured.

    Attributes:
        head: head of the dense model.
        hidden: `[windows, positions, hidden]`, in the model's dtype on the CPU.
    """

    head: Head
    hidden: Float[Tensor, "windows positions hidden"]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: PreTrainedModel,
        windows: Int[Tensor, "windows positions"],
        batch_size: int = 1,
    ) -> "Reference":
        """Run `model` over `windows`."""
        check_windows(model, windows, batch_size, least=2)
        with frozen(model):
            chain = verified_chain(model)
            hidden = torch.empty(*windows.shape, chain.head.linear.in_features, dtype=model.dtype)
            group = batch_size * group_of(model, batch_size * windows.shape[1])
            for some, target in zip(windows.split(group), hidden.split(group), strict=True):
                batches = some.to(model.device, torch.int64).split(batch_size)
                with memory_explained(model, batches[0].numel()):
                    target.copy_(torch.cat(chain.final_states(batches)))
            return cls(chain.head, hidden)


def measure(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    against: PreTrainedModel | Reference | None = None,
    *,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Measure perplexity and entropy of `model` on `windows`; against a dense model also every fidelity metric.

    Every window is scored from its second token; distributions at the same positions are compared. Values are means
    over positions, intervals come from a bootstrap over windows.

    Args:
        model: model to measure, of a supported family.
        windows: token ids, at least two positions.
        against: the dense model, or its `Reference` on the same windows.
        batch_size: windows per step.
        seed: of the bootstrap.

    Returns:
        an estimate for each name in `METRICS` that applies.

    Raises:
        UserError: the windows cannot be used, or the two models have different vocabularies.
        RunError: activations are NaN or infinite, or memory ran out.
    """
    return estimate(measure_windows(model, windows, against, batch_size=batch_size), seed)


def estimate(values: dict[str, Float[Tensor, "windows"]], seed: int = 0) -> dict[str, Estimate]:
    """Average over windows, with bootstrap intervals; a perplexity is `exp` of the mean of its logarithm."""
    estimates = {name: bootstrap_mean(values[name], seed) for name in METRICS if name in values}
    return {name: each.exp() if name.endswith("perplexity") else each for name, each in estimates.items()}


@torch.no_grad()
def measure_windows(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    against: PreTrainedModel | Reference | None = None,
    *,
    batch_size: int = 1,
) -> dict[str, Float[Tensor, "windows"]]:
    """Measure every window, in float64; perplexities as their logarithms."""
    check_windows(model, windows, batch_size, least=2)
    collected: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        models = [model, against] if isinstance(against, PreTrainedModel) else [model]
        for each in models:
            stack.enter_context(frozen(each))
        chains = [verified_chain(each) for each in models]
        heads = [chain.head for chain in chains] + ([against.head] if isinstance(against, Reference) else [])
        sizes = [head.vocabulary for head in heads]
        if len(set(sizes)) != 1:
            raise UserError(f"the vocabularies differ ({sizes[0]} and {sizes[1]}); compare a model with its own origin")
        group = batch_size * max(group_of(each, batch_size * windows.shape[1]) for each in models)
        for number, some in enumerate(track(windows.split(group), "measuring")):
            batches = some.to(torch.int64).split(batch_size)
            with memory_explained(model, batches[0].numel()):
                states = [chain.final_states([each.to(chain.model.device) for each in batches]) for chain in chains]
                if isinstance(against, Reference):
                    states.append(against.hidden[number * group :][: len(some)].to(model.device).split(batch_size))
                near = [head.at_hand() for head in heads]
                for batch, *hidden in zip(batches, *states, strict=True):
                    metrics = _per_position(near, [each[:, :-1] for each in hidden], batch[:, 1:].to(model.device))
                    for name, values in metrics.items():
                        collected.setdefault(name, []).append(values.double().mean(1).cpu())
                del near  # before the blocks come back
    return {name: torch.cat(collected[name]) for name in METRICS if name in collected}


def _per_position(
    heads: list[Head], hidden: list[Tensor], targets: Int[Tensor, "windows positions"]
) -> dict[str, Float[Tensor, "windows positions"]]:
    """Compute every metric at every position; perplexities as the negative log-probability of the target."""
    flat = [states.reshape(-1, states.shape[-1]) for states in hidden]
    answers = targets.reshape(-1, 1)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(answers), heads[0].slice_rows):
        rows = slice(start, start + heads[0].slice_rows)
        logits = [head.logits(states[rows]).to(targets.device) for head, states in zip(heads, flat, strict=True)]
        for piece in zip(*(each.split(heads[0].cache_rows) for each in (answers[rows], *logits)), strict=True):
            for name, values in _metrics(*piece).items():
                parts.setdefault(name, []).append(values)
    return {name: torch.cat(values).view_as(targets) for name, values in parts.items()}


def _metrics(
    answers: Int[Tensor, "rows 1"], logits: LogProbs, dense_logits: LogProbs | None = None
) -> dict[str, Float[Tensor, "rows"]]:
    """Compute every metric for a slice of rows."""
    pruned = logits.log_softmax(-1)
    entropy = _entropy(pruned)
    metrics = {"perplexity": -pruned.gather(1, answers)[:, 0], "entropy": entropy}
    if dense_logits is not None:
        dense = dense_logits.to(logits.dtype).log_softmax(-1)
        metrics["dense_perplexity"] = -dense.gather(1, answers)[:, 0]
        metrics["entropy_shift"] = entropy - _entropy(dense)
        metrics |= compare(dense, pruned)
    return metrics


def compare(dense: LogProbs, pruned: LogProbs) -> dict[str, Float[Tensor, "rows"]]:
    """Compute the fidelity metrics of each row's pair of distributions, given as log-probabilities.

    Each is exact for identical distributions: 0 for divergences, 1 for agreements.
    """
    probs = dense.exp()
    difference = pruned - dense
    # log of (1 + e^d) / 2 without cancellation at d = 0; beyond 60 the other factor is below 1e-26
    ratio = difference.clamp(-60, 60)
    js = -0.5 * (
        torch.linalg.vecdot(probs, (ratio.expm1() / 2).log1p())
        + torch.linalg.vecdot(pruned.exp(), ((-ratio).expm1() / 2).log1p())
    )
    top = [each.topk(min(15, each.shape[-1]), -1).indices for each in (dense, pruned)]
    return {
        "kl": -torch.linalg.vecdot(probs, difference),
        "js_distance": (js / math.log(2)).clamp(min=0).sqrt(),
        "top1_agreement": (top[0][:, 0] == top[1][:, 0]).float(),
        "top5_jaccard": jaccard(top[0][:, :5], top[1][:, :5]),
        "top15_jaccard": jaccard(*top),
    }


def jaccard(first: Int[Tensor, "rows k"], second: Int[Tensor, "rows k"]) -> Float[Tensor, "rows"]:
    """Compute the Jaccard similarity of two sets of distinct indices."""
    shared = (first.unsqueeze(-1) == second.unsqueeze(-2)).sum((-1, -2)).double()
    return shared / (2 * first.shape[-1] - shared)


def _entropy(log_probs: LogProbs) -> Float[Tensor, "rows"]:
    entropy: Tensor = torch.linalg.vecdot(log_probs.exp(), log_probs)
    return -entropy
