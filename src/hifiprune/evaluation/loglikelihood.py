"""Log-likelihoods of continuations; a context that several continuations share is processed once."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

Request = tuple[Any, list[int], list[int]]
"""An identifier, the tokens of a context, and those of its continuation."""


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    longest: int,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """Compute the log-probability of each continuation, and whether it is the greedy one.

    Same as lm-evaluation-harness, with logits in float32, but many answers to one question cost little more than one.

    Args:
        model: the model.
        requests: contexts and continuations, none of them empty.
        longest: context length; the beginning of longer texts is dropped.
        batch_size: continuations per step.
        done: called after every step with the number of requests it finished.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    shared: dict[tuple[int, ...], list[int]] = {}
    for number, (_, text, continuation) in enumerate(requests):
        start = len(text) + len(continuation) - longest - 1
        shared.setdefault(tuple(text[max(0, start) :]), []).append(number)
    for context in sorted(shared, key=len, reverse=True):  # what needs most memory first
        cache = DynamicCache(config=model.config)
        tokens = torch.tensor([context], device=model.device)
        after = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        numbers = sorted(shared[context], key=lambda number: len(requests[number][2]))
        for first in range(0, len(numbers), batch_size):
            some = numbers[first : first + batch_size]
            continuations = [requests[number][2] for number in some]
            logs = _continued(model, cache, after, continuations)
            for number, own, continuation in zip(some, logs, continuations, strict=True):
                wanted = torch.tensor(continuation, device=own.device)
                likely = own[: len(wanted)].gather(1, wanted[:, None]).sum()
                found[number] = float(likely), bool((own[: len(wanted)].argmax(1) == wanted).all())
            done(len(some))
    return found


def _continued(
    model: PreTrainedModel, cache: DynamicCache, after: Tensor, continuations: Sequence[list[int]]
) -> Float[Tensor, "continuations positions vocabulary"]:
    """Return the log-probabilities of each continuation's tokens, given the cache and those right `after` it."""
    after = after.expand(len(continuations), -1, -1)
    rest = max(map(len, continuations)) - 1
    if rest:
        own = deepcopy(cache)
        own.batch_repeat_interleave(len(continuations))
        rows = [[*each[:-1], *[0] * (rest + 1 - len(each))] for each in continuations]  # what follows is none looks at
        tokens = torch.tensor(rows, device=model.device)
        after = torch.cat((after, model(input_ids=tokens, past_key_values=own, use_cache=True).logits), 1)
    return after.float().log_softmax(-1)
