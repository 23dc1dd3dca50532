"""Criteria that are asked for together share their passes and change nothing about each other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune import score
from hifiprune.config import CriterionOptions
from hifiprune.models.mlp import find_blocks
from hifiprune.scoring.criteria import CRITERIA
from hifiprune.scoring.score import Request, count_passes, score_all
from tests.families import tiny_model, tiny_tokens

OPTIONS = CriterionOptions(light_cut=0.1, label_samples=2, seed=3)
EVERYTHING = [(name, OPTIONS) for name in CRITERIA]
DISTILLED = "self-distillation"
REQUESTS: dict[str, tuple[list[Request], tuple[int, int]]] = {
    "weights alone": ([("random", OPTIONS), ("magnitude", OPTIONS), ("ppm", OPTIONS)], (0, 0)),
    "forward alone": ([("wanda-sp", OPTIONS), ("flap", OPTIONS), ("minitron", OPTIONS), ("ppm", OPTIONS)], (1, 0)),
    "one objective": ([("hfprune", OPTIONS), ("entropy", OPTIONS), ("entropy-square", OPTIONS)], (1, 1)),
    "two objectives": ([("entropy", OPTIONS), ("cross-entropy", OPTIONS), ("flap", OPTIONS)], (1, 2)),
    "both forms": ([("cross-entropy-weight", OPTIONS), ("cross-entropy", OPTIONS)], (1, 1)),
    "two labels": ([("fisher", OPTIONS), ("fisher-abs", OPTIONS)], (1, 2)),
    "one of two labels": ([("fisher", OPTIONS), ("fisher", CriterionOptions(seed=3))], (1, 3)),
    "two seeds": ([("fisher", CriterionOptions(seed=1)), ("fisher", CriterionOptions(seed=2))], (1, 2)),
    "two stages": ([(DISTILLED, OPTIONS)], (2, 2)),
    "first stage too": ([("cross-entropy-weight", OPTIONS), (DISTILLED, OPTIONS), ("cross-entropy", OPTIONS)], (2, 2)),
    "two alphas": ([(DISTILLED, CriterionOptions(alpha=0.1)), (DISTILLED, CriterionOptions(alpha=0.2))], (2, 3)),
    "papers' alpha": (
        [(DISTILLED, CriterionOptions()), (DISTILLED, CriterionOptions(alpha=0.4, temperature=0.2))],
        (2, 2),
    ),
    "two light cuts": (
        [(DISTILLED, CriterionOptions(light_cut=0.1)), (DISTILLED, CriterionOptions(light_cut=0.2))],
        (3, 3),
    ),
    "everything": (EVERYTHING, (2, 5)),
}


@contextmanager
def counted(model: PreTrainedModel, positions: int) -> Iterator[Counter[Any]]:
    """Windows of `positions` that each decoder block runs, by its number, and the gradients asked of autograd."""
    blocks = list(find_blocks(model))
    counts: Counter[Any] = Counter()
    forward, gradient = type(blocks[0]).forward, torch.autograd.grad

    def counting_forward(block: torch.nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[1] == positions:
            counts[blocks.index(block)] += len(hidden)
        return forward(block, hidden, *args, **kwargs)

    def counting_gradient(*args: Any, **kwargs: Any) -> Any:
        counts["gradients"] += 1
        return gradient(*args, **kwargs)

    with (
        patch.object(type(blocks[0]), "forward", counting_forward),
        patch.object(torch.autograd, "grad", counting_gradient),
    ):
        yield counts


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_as_many_passes_are_run_as_are_counted(case: str, recompute: bool) -> None:
    (requests, (forwards, backwards)) = REQUESTS[case]
    model, tokens = tiny_model("llama", torch.float32), tiny_tokens(windows=4)
    with counted(model, tokens.shape[1]) as counts:
        score_all(model, tokens, requests, batch_size=2, recompute=recompute)
    again = forwards if recompute and backwards else 0  # what each pass with gradients runs twice, but the last block
    assert [counts[layer] for layer in range(3)] == [4 * (forwards + again)] * 2 + [4 * forwards]
    assert counts["gradients"] == 2 * backwards * 4  # of two batches: through the norm and each of three blocks
    assert count_passes(requests) == (forwards, backwards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_scores_asked_for_together_are_bitwise_those_asked_for_alone(dtype: torch.dtype, recompute: bool) -> None:
    model, tokens = tiny_model("llama-bias", dtype), tiny_tokens()
    together = score_all(model, tokens, EVERYTHING, batch_size=2, recompute=recompute)
    assert [scores.criterion for scores in together] == list(CRITERIA)
    for scores in together:
        alone = score(model, tokens, scores.criterion, OPTIONS, batch_size=2, recompute=recompute)
        assert all(torch.equal(one, other) for one, other in zip(scores.values, alone.values, strict=True))
        assert scores.objective == alone.objective
        assert (scores.model_hash, scores.data_hash) == (alone.model_hash, alone.data_hash)
        assert scores.settings["options"] == alone.settings["options"]


def test_requests_may_come_in_any_order_and_twice() -> None:
    model, tokens = tiny_model("llama", torch.float32), tiny_tokens()
    requests: Sequence[Request] = [*EVERYTHING[::-1], *EVERYTHING[3:9]]
    expected = {scores.criterion: scores.values for scores in score_all(model, tokens, EVERYTHING)}
    found = score_all(model, tokens, requests)
    assert [scores.criterion for scores in found] == [name for name, _ in requests]
    for scores in found:
        pairs = zip(scores.values, expected[scores.criterion], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_options_of_one_request_leave_the_others_alone() -> None:
    model, tokens = tiny_model("llama", torch.float32), tiny_tokens()
    several = [
        CriterionOptions(seed=1),
        CriterionOptions(seed=2, label_samples=2),
        CriterionOptions(alpha=0.9, light_cut=0.3),
        CriterionOptions(alpha=0.1),
    ]
    requests = [(name, options) for name in ("fisher", DISTILLED, "random") for options in several]
    for (name, options), scores in zip(requests, score_all(model, tokens, requests), strict=True):
        alone = score(model, tokens, name, options)
        assert all(torch.equal(one, other) for one, other in zip(scores.values, alone.values, strict=True))


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_batches_and_recomputation_change_no_criterion(variant: str) -> None:
    model, tokens = tiny_model(variant), tiny_tokens(windows=5)
    expected = score_all(model, tokens, EVERYTHING, batch_size=1, recompute=False)
    for batch_size, recompute in [(1, True), (2, False), (2, True), (5, False), (8, True)]:
        found = score_all(model, tokens, EVERYTHING, batch_size=batch_size, recompute=recompute)
        for one, other in zip(found, expected, strict=True):
            for values, wanted in zip(one.values, other.values, strict=True):
                torch.testing.assert_close(values, wanted, rtol=2e-6, atol=1e-7 * wanted.abs().max().item())
            assert one.objective == (other.objective and pytest.approx(other.objective, rel=1e-7))
