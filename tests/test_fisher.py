"""The `fisher` criterion: its labels, the exact Gauss-Newton diagonal, and the damage that it predicts."""

import pydoc_data.topics
from collections import Counter
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune import score
from hifiprune.config import CriterionOptions
from hifiprune.engine import lm_head as head_module
from hifiprune.engine.context import frozen
from hifiprune.engine.hooks import Activations
from hifiprune.engine.lm_head import Head
from hifiprune.engine.sliced_objective import mean_over_positions
from hifiprune.engine.verify import verified_chain
from hifiprune.evaluation.ranks import spearman
from hifiprune.models.mlp import find_mlps
from hifiprune.scoring.objectives import SampledLabel
from hifiprune.scoring.score import score_all
from tests.families import tiny_model
from tests.naive import activations_of, divergence, drawn_labels, logits_of, replaced_activation

VOCABULARY = 50


def identity_head(vocabulary: int) -> Head:
    """The hidden state is the logits, so gradients are those at the logits."""
    linear = nn.Linear(vocabulary, vocabulary, bias=False, dtype=torch.float64).requires_grad_(False)
    nn.init.eye_(linear.weight)
    return Head(linear)


def chi_square(counts: Tensor, probs: Tensor) -> Tensor:
    """Pearson's statistic along the last dimension."""
    expected = counts.sum(-1, keepdim=True) * probs
    return ((counts - expected).square() / expected).sum(-1)


@pytest.mark.parametrize(("sample", "samples"), [(0, 1), (0, 3), (2, 3)])
def test_drawn_labels_follow_the_models_distribution(sample: int, samples: int) -> None:
    """At each of 40 positions with a distribution of its own, over 1,000 seeds."""
    torch.manual_seed(8)
    logits = torch.randn(40, 6, dtype=torch.float64)
    labels = torch.stack([drawn_labels(SampledLabel(seed, sample, samples), logits) for seed in range(1000)])
    statistics = chi_square(functional.one_hot(labels, 6).sum(0).double(), logits.softmax(-1))
    assert statistics.max() < 26  # the 99.99th percentile with 5 degrees of freedom is 25.7
    assert abs(statistics.mean().item() - 5) < 4 * (2 * 5 / 40) ** 0.5
    swapped = chi_square(functional.one_hot(labels, 6).sum(0).double(), logits.roll(1, 0).softmax(-1))
    assert swapped.min() > 26


def test_labels_of_different_positions_and_windows_are_independent() -> None:
    flat = torch.zeros(5, 2, dtype=torch.float64)
    drawn = [[drawn_labels(SampledLabel(seed), flat, window) for window in (0, 1)] for seed in range(600)]
    labels = torch.stack([torch.cat(windows) for windows in drawn])  # a column for each position of the two windows
    agreement = (labels[:, :, None] == labels[:, None, :]).double().mean(0)
    error = 4 * 0.5 / 600**0.5
    assert ((agreement - 0.5).abs() < error)[~torch.eye(10, dtype=torch.bool)].all()


@pytest.mark.parametrize("kernel", [SampledLabel(4), SampledLabel(4, 1, 3)], ids=str)
@pytest.mark.parametrize(("slice_rows", "cache_rows"), [(1, 1), (4, 3), (4, 20), (20, 5), (20, 20)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_labels_do_not_depend_on_slices_or_batches(
    kernel: SampledLabel, slice_rows: int, cache_rows: int, batch_size: int
) -> None:
    torch.manual_seed(0)
    logits, head = torch.randn(5, 13, 29, dtype=torch.float64), identity_head(29)
    expected = torch.stack([drawn_labels(kernel, part, window) for window, part in enumerate(logits)])
    for first in range(0, 5, batch_size):
        batch = logits[first : first + batch_size]
        with patch.object(head_module, "CACHE_BYTES", 4 * 29 * cache_rows):
            ((_, gradient),) = mean_over_positions(
                [kernel],
                batch,
                head,
                torch.zeros(batch.shape[:2], dtype=torch.int64),
                first_window=first,
                slice_rows=slice_rows,
            )
        labels = (batch.softmax(-1) - 13 * gradient).argmax(-1)
        assert torch.equal(labels, expected[first : first + batch_size])


@pytest.mark.parametrize("samples", [2, 5, 16])
def test_systematic_samples_of_a_position_are_spread_over_its_distribution(samples: int) -> None:
    uniform = torch.zeros(30, samples, dtype=torch.float64)
    skewed = torch.tensor([0.5, 0.25, 0.25]).double().log().expand(30, 3)
    labels = [drawn_labels(SampledLabel(2, number, samples), uniform) for number in range(samples)]
    assert torch.equal(torch.stack(labels).sort(0).values, torch.arange(samples).unsqueeze(1).expand(-1, 30))
    shares = functional.one_hot(
        torch.stack([drawn_labels(SampledLabel(2, number, samples), skewed) for number in range(samples)]), 3
    ).sum(0)
    wanted = samples * skewed.exp()
    assert ((shares - wanted).abs() < 1 + 1e-9).all()  # never further than one from the expected number


def windows_of(vocabulary: int, windows: int, positions: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (windows, positions), generator=torch.Generator().manual_seed(seed))


def gauss_newton_diagonal(model: PreTrainedModel, window: Tensor, layer: int) -> Tensor:
    """`sum over positions of h ** 2 * diagonal of J.T @ (diag(p) - p @ p.T) @ J`, with `J` the logits' whole Jacobian.

    `J` is with respect to one MLP's activations `h`: `[positions, vocabulary, positions, neurons]`.
    """
    linear = find_mlps(model)[layer].output
    activation = activations_of(model, window[None])[layer]

    def logits_at(other: Tensor) -> Tensor:
        with replaced_activation(linear, lambda _: other):
            return logits_of(model, window[None])[0]

    jacobian = torch.autograd.functional.jacobian(logits_at, activation)[:, :, 0]
    probs = logits_at(activation).softmax(-1).detach()
    curvature = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    diagonal = torch.einsum("tvsn,tvw,twsn->sn", jacobian, curvature, jacobian)
    return (activation[0].square() * diagonal).sum(0)


def squares_by_draw(model: PreTrainedModel, windows: Tensor, seed: int) -> list[Tensor]:
    """Sum over positions of `(h * dC/dh) ** 2` for each window by itself, `[windows, neurons]` of every MLP."""
    squares = [torch.empty(0)] * len(find_mlps(model))

    def keep(seen: Activations) -> None:
        if seen.kernel is not None:
            squares[seen.layer] = seen.taylor.square().sum(1)

    with frozen(model):
        verified_chain(model).sweep(windows, [SampledLabel(seed)], keep)
    return squares


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_fisher_is_the_exact_gauss_newton_diagonal_in_the_mean_over_draws(variant: str) -> None:
    """A thousand copies of one window: each draws its own labels."""
    draws, positions = 1000, 6
    model, window = tiny_model(variant, vocab_size=VOCABULARY), windows_of(VOCABULARY, 1, positions)
    copies = window.expand(draws, -1)
    scores = score(model, copies, "fisher", CriterionOptions(seed=11), batch_size=draws)
    for layer, squares in enumerate(squares_by_draw(model, copies, seed=11)):
        exact = gauss_newton_diagonal(model, window[0], layer) / (2 * positions)
        by_draw = squares * positions / 2
        torch.testing.assert_close(by_draw.mean(0).float(), scores.values[layer], rtol=1e-5, atol=0)
        error = by_draw.std(0) / draws**0.5
        assert ((by_draw.mean(0) - exact).abs() < 4 * error).all()
        total, total_error = by_draw.sum(1).mean(), by_draw.sum(1).std() / draws**0.5
        assert abs(total - exact.sum()) < 4 * total_error
        assert 4 * total_error < 0.1 * exact.sum()  # a bias of a tenth would be seen


def test_more_labels_at_each_position_bring_the_scores_nearer_to_the_exact_diagonal() -> None:
    model, windows = tiny_model("llama", vocab_size=VOCABULARY), windows_of(VOCABULARY, 3, 6)
    exact = torch.stack(
        [torch.stack([gauss_newton_diagonal(model, w, layer) for w in windows]).mean(0) / 12 for layer in range(3)]
    )
    requests = [("fisher", CriterionOptions(label_samples=samples)) for samples in (1, 8, 64)]
    found = [torch.stack(scores.values).double() for scores in score_all(model, windows, requests, batch_size=3)]
    first, some, many = ((values - exact).norm() / exact.norm() for values in found)
    assert many < some / 2 < first / 4
    assert many < 0.1


def without(neuron: int, activation: Tensor) -> Tensor:
    return activation.index_fill(-1, torch.tensor([neuron]), 0)


def divergences_of_single_neurons(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean KL(dense || without the neuron) over all positions, `[layers, neurons]`: one neuron's activation is zero."""
    with torch.no_grad():
        dense = logits_of(model, windows)
        found = []
        for mlp in find_mlps(model):
            for neuron in range(mlp.neurons):
                with replaced_activation(mlp.output, partial(without, neuron)):
                    found.append(divergence(dense, logits_of(model, windows)).mean())
    return torch.stack(found).view(len(find_mlps(model)), -1)


def rank_correlations(model: PreTrainedModel, windows: Tensor) -> dict[str, tuple[float, float]]:
    """Of `fisher` and `entropy` with the true damage of every neuron: mean within layers, and over all layers."""
    truth = divergences_of_single_neurons(model, windows)
    requests = [("fisher", CriterionOptions(label_samples=32)), ("entropy", CriterionOptions())]
    found = {}
    for scores in score_all(model, windows, requests, batch_size=len(windows)):
        values = torch.stack(scores.values)
        within, across = spearman(values, truth).mean(), spearman(values.flatten(), truth.flatten())
        found[scores.criterion] = (within.item(), across.item())
    return found


@cache
def text_ids() -> Tensor:
    """Python's documentation in its 49 most frequent characters; any other is the fiftieth."""
    text = "".join(pydoc_data.topics.topics.values()).lower()[:100_000]
    known = {character: number for number, (character, _) in enumerate(Counter(text).most_common(VOCABULARY - 1))}
    return torch.tensor([known.get(character, VOCABULARY - 1) for character in text])


def text_windows(windows: int, positions: int, seed: int) -> Tensor:
    starts = windows_of(len(text_ids()) - positions, windows, 1, seed)
    return text_ids()[starts + torch.arange(positions)]


def trained_model(variant: str, steps: int = 100) -> PreTrainedModel:
    """A tiny model that has learned some English spelling."""
    model = tiny_model(variant, torch.float32, vocab_size=VOCABULARY, initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = text_windows(16, 32, seed=step)
        functional.cross_entropy(logits_of(model, batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.double()


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("seed", [0, 1])
def test_fisher_ranks_the_damage_of_single_neurons_better_than_entropy(variant: str, seed: int) -> None:
    model = tiny_model(variant, seed=seed, vocab_size=VOCABULARY)
    found = rank_correlations(model, windows_of(VOCABULARY, 4, 16, seed))
    for fisher, entropy in zip(found["fisher"], found["entropy"], strict=True):
        assert fisher > entropy + 0.02
        assert fisher > 0.85


def test_fisher_ranks_the_damage_better_than_entropy_in_a_trained_model() -> None:
    found = rank_correlations(trained_model("llama"), text_windows(4, 32, seed=1000))
    for fisher, entropy in zip(found["fisher"], found["entropy"], strict=True):
        assert fisher > entropy + 0.02
        assert fisher > 0.95
