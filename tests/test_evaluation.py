"""Fidelity metrics against naive float64 formulas, and their exact values at the extremes."""

import copy
import math

import pytest
import torch
from torch import Tensor

from hifiprune import UserError, measure
from hifiprune.evaluation.bootstrap import bootstrap_mean
from hifiprune.evaluation.fidelity import METRICS, compare, jaccard
from hifiprune.models.mlp import find_mlps
from tests.families import tiny_model, tiny_tokens


def naive_metrics(dense: Tensor, pruned: Tensor, tokens: Tensor) -> dict[str, float]:
    """Every metric from full float64 logits, position by position."""
    p, q = dense[:, :-1].softmax(-1), pruned[:, :-1].softmax(-1)
    middle = (p + q) / 2
    kl = (p * (p / q).log()).sum(-1)
    js = 0.5 * (p * (p / middle).log2()).sum(-1) + 0.5 * (q * (q / middle).log2()).sum(-1)
    targets = tokens[:, 1:, None]
    entropies = [-(x * x.log()).sum(-1).mean().item() for x in (p, q)]

    def overlap(k: int) -> float:
        values = []
        for one, other in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True):
            first, second = (set(x.argsort(descending=True)[:k].tolist()) for x in (one, other))
            values.append(len(first & second) / len(first | second))
        return sum(values) / len(values)

    return {
        "perplexity": math.exp(-q.gather(-1, targets).log().mean().item()),
        "dense_perplexity": math.exp(-p.gather(-1, targets).log().mean().item()),
        "kl": kl.mean().item(),
        "js_distance": js.sqrt().mean().item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "top5_jaccard": overlap(5),
        "top15_jaccard": overlap(15),
        "entropy": entropies[1],
        "entropy_shift": entropies[1] - entropies[0],
    }


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_metrics_equal_the_naive_formulas(variant: str, batch_size: int) -> None:
    dense, pruned, tokens = tiny_model(variant), tiny_model(variant), tiny_tokens(windows=4)
    with torch.no_grad():
        for mlp in find_mlps(pruned):
            mlp.output.weight[:, ::3] = 0
        expected = naive_metrics(dense(input_ids=tokens).logits, pruned(input_ids=tokens).logits, tokens)
    found = measure(pruned, tokens, dense, batch_size=batch_size)
    assert set(found) == set(METRICS) == set(expected)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert found["kl"].value > 0.01


def test_one_model_alone_has_perplexity_and_entropy() -> None:
    assert set(measure(tiny_model("llama"), tiny_tokens())) == {"perplexity", "entropy"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_are_exactly_faithful(dtype: torch.dtype) -> None:
    found = measure(tiny_model("llama", dtype), tiny_tokens(), tiny_model("llama", dtype))
    for name in ("kl", "js_distance", "entropy_shift"):
        assert (found[name].value, found[name].low, found[name].high) == (0, 0, 0)
    for name in ("top1_agreement", "top5_jaccard", "top15_jaccard"):
        assert (found[name].value, found[name].low, found[name].high) == (1, 1, 1)


def test_disjoint_distributions_are_at_distance_one() -> None:
    logits = torch.full((1, 8), -400.0)
    dense, pruned = logits.clone(), logits.clone()
    dense[0, :4], pruned[0, 4:] = 0.0, 0.0
    found = compare(dense.log_softmax(-1), pruned.log_softmax(-1))
    assert found["js_distance"].item() == pytest.approx(1, abs=1e-6)
    assert found["kl"].item() == pytest.approx(400, rel=1e-5)
    assert found["top1_agreement"].item() == 0


def test_small_divergences_keep_their_digits_in_float32() -> None:
    torch.manual_seed(0)
    exact = torch.randn(50, 300, dtype=torch.float64)
    near = exact + 1e-2 * torch.randn(50, 300, dtype=torch.float64)
    p, q = exact.log_softmax(-1), near.log_softmax(-1)
    truth = compare(p, q)
    found = compare(p.float(), q.float())
    for name in ("js_distance", "kl"):
        torch.testing.assert_close(found[name].double(), truth[name], rtol=5e-3, atol=0)


def test_jaccard_counts_sets() -> None:
    assert jaccard(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 4, 1]])).item() == pytest.approx(2 / 4)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        estimate = bootstrap_mean(torch.randn(40, generator=generator), seed=trial)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99
    assert bootstrap_mean(torch.tensor([2.0])).low is None


def test_windows_of_one_position_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="windows must have 2 to 64 positions, not 1"):
        measure(tiny_model("llama"), tiny_tokens(positions=1))


def test_models_of_different_dtypes_are_compared() -> None:
    single = tiny_model("llama", torch.float32)
    found = measure(single, tiny_tokens(), copy.deepcopy(single).double())
    assert abs(found["kl"].value) < 1e-5, "zero but for rounding in float32"
    assert found["perplexity"].value == pytest.approx(found["dense_perplexity"].value, rel=1e-4)


def test_models_of_different_vocabularies_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"vocabularies differ \(61 and 62\)"):
        measure(tiny_model("llama"), tiny_tokens(), tiny_model("llama", vocab_size=62))
