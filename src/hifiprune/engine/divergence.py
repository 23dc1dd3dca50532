"""KL divergence between two models' predictions, from their final hidden states."""

import torch
from jaxtyping import Float
from torch import Tensor

from hifiprune.engine.lm_head import Head


def small_divergence(
    dense: Float[Tensor, "windows positions hidden"], pruned: Float[Tensor, "windows positions hidden"], head: Head
) -> Float[Tensor, "rows"]:
    """Compute the KL divergence at each position in nats, precisely even where distributions hardly differ.

    Same as `(p * (ln p - ln q)).sum(-1)`. Its terms of first order cancel in the sum, and their rounding errors would
    be larger than the divergence of a single neuron; so the terms summed are `p * (exp(d) - 1 - d)`, `d = ln q - ln p`,
    which are never negative. Terms have the dtype of the logits, float32 or better.
    """
    values = []
    rows = [states.flatten(0, 1).split(head.slice_rows) for states in (dense, pruned)]
    for pair in zip(*rows, strict=True):
        logits = [head.logits(part) for part in pair]
        for own, other in zip(*(each.split(head.cache_rows) for each in logits), strict=True):
            log_probs, other_log_probs = own.log_softmax(-1), other.log_softmax(-1)
            shift, probs = other_log_probs - log_probs, log_probs.exp_()
            terms = (shift.expm1() - shift) * probs
            far = shift > 20  # where q / p may overflow and p underflow; there nothing cancels
            if far.any():
                terms = torch.where(far, other_log_probs.exp() - probs - probs * shift, terms)
            values.append(terms.sum(-1).double())
    return torch.cat(values)
