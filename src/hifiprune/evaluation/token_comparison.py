"""Compare the predictions of two models token by token."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.engine.context import check_windows, frozen
from hifiprune.engine.verify import verified_chain
from hifiprune.evaluation.fidelity import compare
from hifiprune.results import Token

TOP = 10
CONTEXT = 4
"""Number of preceding tokens that may share a character, or a space, with the next one."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@torch.no_grad()
def read_passage(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Int[Tensor, "positions"],
) -> list[Token]:
    """Return each token of a passage, and from the second one on the KL divergence and both models' likeliest tokens.

    Args:
        dense: the dense model.
        pruned: the pruned model, with the same vocabulary.
        tokenizer: tokenizer of both.
        tokens: the passage.
    """
    window, ids = tokens[None], tokens.tolist()
    check_windows(pruned, window, 1, least=2)
    expected = [_expected(model, window) for model in (dense, pruned)]
    expected[0] = expected[0].to(expected[1])
    divergence = compare(*expected)["kl"].tolist()
    likeliest = [_likeliest(each, tokenizer, ids) for each in expected]
    texts = [in_place(tokenizer, ids[:place], token) for place, token in enumerate(ids)]
    return [Token(texts[0])] + [
        Token(text, kl, theirs, ours) for text, kl, theirs, ours in zip(texts[1:], divergence, *likeliest, strict=True)
    ]


def _expected(model: PreTrainedModel, window: Int[Tensor, "1 positions"]) -> Tensor:
    """Return the log-probabilities at every position but the last."""
    with frozen(model):
        chain = verified_chain(model)
        hidden = chain.final_hidden(window.to(model.device, torch.int64))[0, :-1]
        return chain.head.logits(hidden).log_softmax(-1)


def _likeliest(logs: Tensor, tokenizer: PreTrainedTokenizerBase, passage: list[int]) -> list[list[tuple[str, float]]]:
    """Return pairs of predicted token and probability for every position but the last."""
    top = logs.exp().topk(min(TOP, logs.shape[1]))
    return [
        [
            (in_place(tokenizer, passage[: place + 1], token), round(share, 4))
            for token, share in zip(tokens, shares, strict=True)
        ]
        for place, (tokens, shares) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    ]


def in_place(tokenizer: PreTrainedTokenizerBase, before: list[int], token: int) -> str:
    """Decode a token in its context: some tokenizers drop the space of a first token."""
    start = str(tokenizer.decode(before[-CONTEXT:])).rstrip(INCOMPLETE)
    return str(tokenizer.decode([*before[-CONTEXT:], token]))[len(start) :]
