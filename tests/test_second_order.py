"""Costs of removal against brute force: every single neuron, and every pair of six, removed and the others refitted."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune import CriterionOptions, RunError, find_mlps, score
from hifiprune.scoring.objectives import SampledLabel
from hifiprune.scoring.obs import removal_costs
from tests.families import tiny_model
from tests.naive import activations_of, drawn_labels, logits_of


def drawn(seed: int, neurons: int = 6, hidden: int = 4, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of neurons that resemble each other, an output map, and a metric."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(neurons, neurons, generator=chance, dtype=torch.float64)
    h = torch.randn(tokens, neurons, generator=chance, dtype=torch.float64) @ mixed
    weight = torch.randn(hidden, neurons, generator=chance, dtype=torch.float64)
    root = torch.randn(hidden, hidden, generator=chance, dtype=torch.float64)
    return h, weight, root @ root.T


@contextmanager
def recorded_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What every MLP's output map writes, in layer order, with its graph."""
    outputs: list[Tensor] = []
    hooks = [
        mlp.output.module.register_forward_hook(lambda *call: outputs.append(call[-1])) for mlp in find_mlps(model)
    ]
    yield outputs
    for hook in hooks:
        hook.remove()


def brute_force(h: Tensor, weight: Tensor, metric: Tensor, gone: tuple[int, ...]) -> float:
    """What is lost in the metric when neurons go and least squares refits the others."""
    stays = [neuron for neuron in range(h.shape[1]) if neuron not in gone]
    target = h @ weight.T
    refitted = torch.linalg.lstsq(h[:, stays], target).solution
    lost = target - h[:, stays] @ refitted
    return float(((lost @ metric) * lost).sum())


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_first_to_go_is_the_best_of_all_and_the_pair_is_the_best_that_holds_it(seed: int) -> None:
    h, weight, metric = drawn(seed)
    costs = removal_costs(h.T @ h, weight, metric @ weight, block=1, damping=0.0)
    singles = [brute_force(h, weight, metric, (neuron,)) for neuron in range(6)]
    first = min(range(6), key=lambda neuron: singles[neuron])
    assert float(costs[first]) == pytest.approx(singles[first], rel=1e-6)
    assert float(costs[first]) == float(costs.min())
    pairs = {pair: brute_force(h, weight, metric, pair) for pair in combinations(range(6), 2) if first in pair}
    more = max(min(pairs.values()) - singles[first], singles[first])  # costs never fall along the order
    assert float(costs.sort().values[1]) == pytest.approx(more, rel=1e-6)


def test_every_single_cost_equals_brute_force() -> None:
    h, weight, metric = drawn(1)
    costs = removal_costs(h.T @ h, weight, metric @ weight, block=6, damping=0.0)
    expected = torch.tensor([brute_force(h, weight, metric, (neuron,)) for neuron in range(6)])
    torch.testing.assert_close(costs, expected.double(), rtol=1e-6, atol=0)


def test_of_neurons_that_say_the_same_all_but_one_go_first() -> None:
    h, weight, metric = drawn(2)
    h = torch.cat((h, h[:, :2]), 1)
    weight = torch.cat((weight, 3 * weight[:, :2]), 1)
    costs = removal_costs(h.T @ h, weight, metric @ weight, block=1, damping=1e-9)
    first = set(costs.argsort(stable=True)[:2].tolist())
    assert len(first & {0, 6}) == 1
    assert len(first & {1, 7}) == 1


def test_moments_that_do_not_fit_are_refused_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.scoring.score.free_bytes", lambda device: 61_439)
    with pytest.raises(
        RunError, match=r"'obs' keeps 6\.14e-05 GB of second moments on cpu, where 6\.14e-05 GB are free"
    ):
        score(tiny_model("llama"), torch.zeros(2, 8, dtype=torch.int64), "obs")
    monkeypatch.setattr("hifiprune.scoring.score.free_bytes", lambda device: 8 * 3 * 40 * (40 + 24))
    score(tiny_model("llama"), torch.zeros(2, 8, dtype=torch.int64), "obs")


@pytest.mark.parametrize("tokens", [3, 40])
def test_dead_neurons_and_few_tokens_stay_finite(tokens: int) -> None:
    h, weight, metric = drawn(3, neurons=20, tokens=tokens)
    h[:, 5] = 0
    costs = removal_costs(h.T @ h, weight, metric @ weight)
    assert costs.isfinite().all()
    assert removal_costs(torch.zeros(20, 20), weight, metric @ weight).isfinite().all()
    if tokens > 20:
        assert costs.argmin() == 5


@pytest.mark.parametrize("variant", ["llama", "llama-bias", "qwen3"])
def test_the_criterion_is_the_cost_in_nats_by_autograd_and_least_squares(variant: str) -> None:
    model, tokens = tiny_model(variant), torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(5))
    found = score(model, tokens, "obs", CriterionOptions(seed=2), batch_size=3)
    losses = []
    with recorded_outputs(model) as outputs:
        logits = logits_of(model, tokens)
    for window, part in enumerate(logits):
        losses.append(functional.cross_entropy(part, drawn_labels(SampledLabel(2), part, window), reduction="sum"))
    slopes = torch.autograd.grad(torch.stack(losses).sum(), outputs)
    parts = zip(find_mlps(model), slopes, activations_of(model, tokens), found.values, strict=True)
    for mlp, slope, h, costs in ((mlp, slope.flatten(0, 1), h.flatten(0, 1), costs) for mlp, slope, h, costs in parts):
        metric = slope.T @ slope / len(slope)
        weight = mlp.output.weight.detach()
        dampen = (0.01 * h.square().sum(0).mean()).sqrt() * torch.eye(h.shape[1])  # as rows of more tokens
        singles = [brute_force(torch.cat((h, dampen)), weight, metric, (neuron,)) for neuron in range(h.shape[1])]
        nats = torch.tensor(singles) / 2 / len(h)
        assert int(costs.argmin()) == int(nats.argmin())
        assert float(costs.min()) == pytest.approx(float(nats.min()), rel=1e-5)
