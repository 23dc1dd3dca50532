"""Every criterion against an independent implementation: plain transformers, autograd and the papers' formulas."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune import UserError, cut_, score
from hifiprune.config import CriterionOptions
from hifiprune.config.groups import SDMPRUNE_SETTINGS
from hifiprune.models.mlp import find_mlps
from hifiprune.scoring.accumulate import Pass
from hifiprune.scoring.criteria import CRITERIA, describe_criteria
from hifiprune.scoring.objectives import SampledLabel
from hifiprune.scoring.score import score_all
from tests.families import FORMS, ROUTED, tiny_model, tiny_tokens
from tests.naive import (
    Loss,
    activations_of,
    distillation_loss,
    drawn_labels,
    labels_loss,
    logits_of,
    mean_entropy,
    next_token_loss,
    taylor_products,
    weight_products,
)
from tests.test_families import plan_keeping

DATA_FREE = ("magnitude", "ppm", "random")
SETTINGS: list[dict[str, Any]] = [{"batch_size": b, "recompute": r} for b, r in product((1, 2), (False, True))]
TWO_SETTINGS = [SETTINGS[0], SETTINGS[-1]]


def assert_scores(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    """Equal but for the rounding of scores to float32 and of norms that transformers computes in float32."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=rtol, atol=1e-7 * other.abs().max().item())


def absolute_sum(products: Tensor) -> Tensor:
    """Of `[windows, positions, neurons]` over windows and positions."""
    return products.abs().sum((0, 1))


def square_sum(products: Tensor) -> Tensor:
    return products.square().sum((0, 1))


def weight_absolute(products: Tensor) -> Tensor:
    """Of `[windows, neurons, hidden]`: absolute values of each window's, averaged over the elements of a neuron."""
    return products.abs().mean(2).sum(0)


@pytest.mark.parametrize("variant", FORMS + ROUTED)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cross_entropy_weight_equals_weight_gradients_of_the_whole_model(
    variant: str, settings: dict[str, Any]
) -> None:
    model, tokens = tiny_model(variant), tiny_tokens()
    products = weight_products(model, tokens, [next_token_loss] * len(tokens))
    found = score(model, tokens, "cross-entropy-weight", **settings)
    assert_scores(found.values, [weight_absolute(layer) for layer in products])


@pytest.mark.parametrize("variant", ["llama", "gemma2", "smollm3"])
@pytest.mark.parametrize("settings", TWO_SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("criterion", "loss", "statistic"),
    [
        ("hfprune", mean_entropy, absolute_sum),
        ("entropy", mean_entropy, absolute_sum),
        ("entropy-square", mean_entropy, square_sum),
        ("cross-entropy", next_token_loss, absolute_sum),
        ("cross-entropy-square", next_token_loss, square_sum),
    ],
)
def test_activation_forms_equal_activation_gradients_of_the_whole_model(
    variant: str, settings: dict[str, Any], criterion: str, loss: Loss, statistic: Callable[[Tensor], Tensor]
) -> None:
    model, tokens = tiny_model(variant), tiny_tokens()
    products = taylor_products(model, tokens, [loss] * len(tokens))
    found = score(model, tokens, criterion, **settings)
    assert_scores(found.values, [statistic(layer) for layer in products])
    with torch.no_grad():
        values = [loss(logits_of(model, window[None])[0], window) for window in tokens]
    assert found.objective == pytest.approx(torch.stack(values).mean().item(), rel=1e-6)


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
@pytest.mark.parametrize("samples", [1, 3])
def test_fisher_equals_autograd_with_the_labels_that_were_drawn(variant: str, samples: int) -> None:
    model, tokens = tiny_model(variant), tiny_tokens()
    with torch.no_grad():
        logits = logits_of(model, tokens)
    squares, absolutes = [torch.zeros(3, 40, dtype=torch.float64) for _ in range(2)]
    for sample in range(samples):
        kernel = SampledLabel(9, sample, samples)
        losses = [labels_loss(drawn_labels(kernel, part, window)) for window, part in enumerate(logits)]
        products = taylor_products(model, tokens, losses)
        squares += torch.stack([square_sum(layer) for layer in products])
        absolutes += torch.stack([absolute_sum(layer) for layer in products])
    # of the sum over positions, halved, in the mean over positions, windows and samples
    nats = squares * 11**2 / 2 / (11 * 3 * samples)
    options = CriterionOptions(label_samples=samples, seed=9)
    assert_scores(score(model, tokens, "fisher", options, batch_size=2).values, [*nats])
    assert_scores(score(model, tokens, "fisher-abs", options, batch_size=2).values, [*absolutes])


def light_cut(model: PreTrainedModel, first: list[Tensor], width: int) -> tuple[PreTrainedModel, list[Tensor]]:
    """A copy of the model without the lowest scores of the first stage, and what it keeps."""
    kept = [scores.topk(width).indices.sort().values for scores in first]
    student = copy.deepcopy(model)
    cut_(student, plan_keeping(student, kept))
    return student, kept


@pytest.mark.parametrize("variant", ["llama", "llama-bias", "gemma2", "smollm3"])
@pytest.mark.parametrize(
    ("alpha", "temperature", "fraction", "width"),
    [(0.42, 0.5, 0.025, 39), (1.0, 2.0, 0.26, 29), (0.0, 1.0, 0.1, 36), (0.7, 1.0, 0.5, 20)],
)
@pytest.mark.parametrize("settings", TWO_SETTINGS, ids=str)
def test_self_distillation_equals_two_stages_with_a_copy_as_the_teacher(
    variant: str, alpha: float, temperature: float, fraction: float, width: int, settings: dict[str, Any]
) -> None:
    teacher, tokens = tiny_model(variant), tiny_tokens()
    first = [weight_absolute(p) for p in weight_products(teacher, tokens, [next_token_loss] * len(tokens))]
    student, kept = light_cut(teacher, first, width)
    with torch.no_grad():
        targets = logits_of(teacher, tokens)
    losses = [distillation_loss(target, alpha, temperature) for target in targets]
    second = weight_products(student, tokens, losses)

    options = CriterionOptions(alpha=alpha, temperature=temperature, light_cut=fraction)
    scores = score(teacher, tokens, "self-distillation", options, **settings)
    with torch.no_grad():
        values = [loss(logits_of(student, w[None])[0], w) for loss, w in zip(losses, tokens, strict=True)]
    chosen = [values[indices] for values, indices in zip(scores.values, kept, strict=True)]
    assert_scores(chosen, [weight_absolute(layer) for layer in second])
    for late, early, indices in zip(scores.values, first, kept, strict=True):
        removed = torch.ones(40, dtype=torch.bool).index_fill(0, indices, False)
        assert late[removed].max() < 0 <= late[indices].min()
        assert torch.equal(late[removed].argsort(), early[removed].argsort())
    assert scores.objective == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)


def wanda_sp(h: Tensor, weight: Tensor) -> Tensor:
    """arXiv 2306.11695, eq. 1, `|W[i, j]| * ||X[j]||`, the column mean of it as arXiv 2312.11983 has it."""
    norms = h.flatten(0, 1).square().sum(0).sqrt()
    return (weight.abs() * norms).mean(0)


def flap(h: Tensor, weight: Tensor) -> Tensor:
    """arXiv 2312.11983, eq. 4 and 5: sample variance times squared norm of the column, standardised."""
    rows = h.flatten(0, 1)
    variance = (rows - rows.mean(0)).square().sum(0) / (len(rows) - 1)
    metric = variance * weight.square().sum(0)
    deviation = ((metric - metric.mean()).square().sum() / (len(metric) - 1)).sqrt()
    return (metric - metric.mean()) / deviation


def minitron(h: Tensor, weight: Tensor) -> Tensor:
    """arXiv 2407.14679, section 2.2: mean of the magnitudes along the sequence, l2 norm along the batch."""
    return h.abs().mean(1).square().sum(0).sqrt()


@pytest.mark.parametrize("variant", ["llama-bias", "gemma2", "qwen3"])
@pytest.mark.parametrize("settings", TWO_SETTINGS, ids=str)
@pytest.mark.parametrize(("criterion", "formula"), [("wanda-sp", wanda_sp), ("flap", flap), ("minitron", minitron)])
def test_forward_criteria_equal_the_formulas_of_their_papers(
    variant: str, settings: dict[str, Any], criterion: str, formula: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model, tokens = tiny_model(variant), tiny_tokens()
    activations = activations_of(model, tokens)
    found = score(model, tokens, criterion, **settings)
    weights = [mlp.output.weight.detach() for mlp in find_mlps(model)]
    assert_scores(found.values, [formula(h, weight) for h, weight in zip(activations, weights, strict=True)])
    assert found.objective is None
    if criterion == "minitron":
        assert found.means is None
    else:
        assert found.means is not None
        assert_scores(found.means, [h.mean((0, 1)) for h in activations])


def magnitude(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """l2 norm of the row of gate, the row of up and the column of down, end to end."""
    return torch.cat((gate, up, down.T), 1).square().sum(1).sqrt()


def ppm(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return sum(((weight.max(1).values - weight.min(1).values) for weight in (gate, up)), torch.zeros(len(gate)))


@pytest.mark.parametrize("variant", ["llama-bias", "gemma2"])
@pytest.mark.parametrize(("criterion", "formula"), [("magnitude", magnitude), ("ppm", ppm)])
@pytest.mark.parametrize("windows", [None, tiny_tokens()], ids=["no data", "data"])
def test_criteria_without_data_equal_their_formulas(
    variant: str, criterion: str, formula: Callable[[Tensor, Tensor, Tensor], Tensor], windows: Tensor | None
) -> None:
    model = tiny_model(variant)
    weights = [[linear.weight.detach() for linear in (*mlp.inputs, mlp.output)] for mlp in find_mlps(model)]
    found = score(model, windows, criterion)
    assert_scores(found.values, [formula(*each) for each in weights])
    assert found.data_hash == ""


def test_random_scores_are_uniform_seeded_and_differ_between_layers() -> None:
    model = tiny_model("llama", intermediate_size=400)
    draw = partial(score, model, None, "random")
    first, again, other = draw(), draw(CriterionOptions(seed=0)), draw(CriterionOptions(seed=1))
    layers = [*first.values, *other.values]
    assert all(torch.equal(a, b) for a, b in zip(first.values, again.values, strict=True))
    for number, values in enumerate(layers):
        assert ((values >= 0) & (values < 1)).all()
        quarters = torch.histc(values, 4, 0, 1)
        assert ((quarters - 100).abs() < 4 * (400 * 0.25 * 0.75) ** 0.5).all()
        correlations = [torch.corrcoef(torch.stack((values, later)))[0, 1] for later in layers[number + 1 :]]
        assert all(abs(each) < 4 / 400**0.5 for each in correlations)
    assert score(model, tiny_tokens(), "random").values[0].tolist() == first.values[0].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.4}, r"alpha 1.4 must lie in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha -0.1 must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, r"alpha nan must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature 0 must be above 0"),
        ({"temperature": -2.0}, "temperature -2 must be above 0"),
        ({"seed": -1}, "seed -1 must lie in 0 to 4294967295"),
        ({"light_cut": 0.0}, r"light-cut 0 must lie in \(0, 1\)"),
        ({"light_cut": 1.0}, r"light-cut 1 must lie in \(0, 1\)"),
        ({"light_cut": 2.5}, r"light-cut 2.5 must lie in \(0, 1\)"),
        ({"label_samples": 0}, "label-samples 0 must be at least 1"),
        ({"label_samples": -3}, "label-samples -3 must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CriterionOptions(**given)  # type: ignore[arg-type]


def test_a_light_cut_that_leaves_nothing_is_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pass, "run", None)
    with pytest.raises(UserError, match=r"light-cut 0\.99 leaves no neuron in a layer"):
        score(tiny_model("llama"), tiny_tokens(), "self-distillation", CriterionOptions(light_cut=0.99))


def test_options_at_the_limits_are_taken() -> None:
    for alpha in (0.0, 1.0):
        assert CriterionOptions(alpha=alpha, temperature=1e-3, light_cut=0.999, label_samples=1).alpha == alpha


@pytest.mark.parametrize(
    ("ratio", "alpha", "temperature"),
    [
        (0.2, 0.4, 0.2),
        (0.01, 0.4, 0.2),
        (0.24, 0.4, 0.2),
        (0.3, 0.42, 0.5),
        (0.34, 0.42, 0.5),
        (0.4, 0.1, 0.2),
        (0.36, 0.1, 0.2),
        (0.9, 0.1, 0.2),
    ],
)
def test_options_left_open_are_the_papers_at_the_nearest_ratio(ratio: float, alpha: float, temperature: float) -> None:
    found = CriterionOptions(seed=3, light_cut=0.1).for_ratio(ratio)
    assert found == CriterionOptions(alpha=alpha, temperature=temperature, seed=3, light_cut=0.1)
    assert CriterionOptions(alpha=0.0).for_ratio(ratio) == CriterionOptions(alpha=0.0, temperature=temperature)
    assert CriterionOptions(temperature=7.0).for_ratio(ratio) == CriterionOptions(alpha=alpha, temperature=7.0)
    assert CriterionOptions(alpha=0.5, temperature=7.0).for_ratio(ratio) == CriterionOptions(alpha=0.5, temperature=7.0)


def test_scores_record_the_options_that_matter_to_them() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    options = CriterionOptions(light_cut=0.1, label_samples=2, seed=4)
    alpha, temperature = SDMPRUNE_SETTINGS[0.2]
    distilled = {"alpha": alpha, "temperature": temperature, "light_cut": 0.1}
    expected = {
        "entropy": {},
        "wanda-sp": {},
        "fisher": {"label_samples": 2, "seed": 4},
        "self-distillation": distilled,
        "random": {"seed": 4},
    }
    found = score_all(model, tokens, [(name, options) for name in expected])
    assert {scores.criterion: scores.settings["options"] for scores in found} == expected


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_that_need_data_say_so(criterion: str) -> None:
    model = tiny_model("llama")
    needs = {each["name"]: each["needs"] for each in describe_criteria()}
    if criterion in DATA_FREE:
        assert needs[criterion] == "weights"
        assert len(score(model, None, criterion).values) == 3
    else:
        assert "forward" in needs[criterion]
        with pytest.raises(UserError, match=f"criterion '{criterion}' needs calibration data"):
            score(model, None, criterion)
        with pytest.raises(UserError, match=f"criterion '{criterion}' needs calibration data"):
            score_all(model, None, [("magnitude", CriterionOptions()), (criterion, CriterionOptions())])
