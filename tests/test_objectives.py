"""Entropy and its gradient against the naive formula in float64, and heads against the models' own logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hifiprune.blocks import BlockChain
from hifiprune.errors import UserError
from hifiprune.head import Head
from hifiprune.objectives import Entropy, entropy_, mean_over_positions
from tests.families import tiny_model, tiny_tokens


def naive_entropy(logits: Tensor) -> Tensor:
    probs = logits.softmax(-1)
    return -(probs * probs.log()).sum(-1)


def make_head(vocabulary: int, width: int, dtype: torch.dtype = torch.float64, **options: float) -> Head:
    torch.manual_seed(3)
    return Head(
        nn.Linear(width, vocabulary, bias=bool(options.pop("bias", 0)), dtype=dtype).requires_grad_(False), **options
    )


def labels_for(hidden: Tensor) -> Tensor:
    """Tokens that entropy does not look at."""
    return torch.zeros(hidden.shape[:2], dtype=torch.int64)


def naive_mean(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().requires_grad_()
    logits = head.linear(hidden) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    values = naive_entropy(logits).mean(-1)
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    return values.detach(), gradient


@given(
    windows=st.integers(1, 3),
    positions=st.integers(1, 13),
    vocabulary=st.integers(2, 50),
    slice_rows=st.integers(1, 20),
    cap=st.sampled_from([None, 2.5]),
    scale=st.sampled_from([1.0, 0.25]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_sliced_entropy_equals_the_naive_formula(
    windows: int, positions: int, vocabulary: int, slice_rows: int, cap: float | None, scale: float, bias: bool
) -> None:
    head = make_head(vocabulary, 7, cap=cap, scale=scale, bias=bias)  # type: ignore[arg-type]
    hidden = 5 * torch.randn(windows, positions, 7, dtype=torch.float64)
    ((values, gradient),) = mean_over_positions([Entropy()], hidden, head, labels_for(hidden), slice_rows=slice_rows)
    expected_values, expected_gradient = naive_mean(hidden, head)
    torch.testing.assert_close(values, expected_values, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


def test_gradient_equals_finite_differences() -> None:
    head = make_head(23, 5, cap=4.0, scale=0.5)
    hidden = torch.randn(2, 3, 5, dtype=torch.float64)
    ((_, gradient),) = mean_over_positions([Entropy()], hidden, head, labels_for(hidden))
    step = 1e-6
    for index in range(hidden.numel()):
        nudge = torch.zeros(hidden.numel(), dtype=torch.float64)
        nudge[index] = step
        nudge = nudge.view_as(hidden)
        above, below = (
            mean_over_positions([Entropy()], hidden + s * nudge, head, labels_for(hidden))[0][0].sum() for s in (1, -1)
        )
        assert (above - below).item() / (2 * step) == pytest.approx(gradient.view(-1)[index].item(), abs=1e-8)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_float32_error_is_no_worse_than_the_naive_formula(spread: float) -> None:
    torch.manual_seed(0)
    exact = spread * torch.randn(64, 5000, dtype=torch.float64)
    single = exact.float()
    leaf = single.double().requires_grad_()
    truth = naive_entropy(leaf)
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    naive_leaf = single.clone().requires_grad_()
    log_probs = naive_leaf.log_softmax(-1)
    naive = -(log_probs.exp() * log_probs).sum(-1)
    (naive_slope,) = torch.autograd.grad(naive.sum(), naive_leaf)
    ours_slope = single.clone()
    ours = entropy_(ours_slope)
    assert (ours - truth).abs().max() <= 2 * (naive - truth).abs().max() + 1e-7
    assert (ours_slope - slope).abs().max() <= 2 * (naive_slope - slope).abs().max() + 1e-9


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    values = entropy_(logits)
    torch.testing.assert_close(
        values, torch.tensor([0.0, 3.0]).where(torch.tensor([True, False]), torch.tensor(3.0).log())
    )
    assert logits.isfinite().all()


def test_half_precision_hidden_states_are_computed_in_float32() -> None:
    head = make_head(20_000, 16, torch.bfloat16)  # more columns than are converted at a time
    hidden = torch.randn(1, 5, 16, dtype=torch.bfloat16)
    ((values, gradient),) = mean_over_positions([Entropy()], hidden, head, labels_for(hidden))
    exact = Head(nn.Linear(16, 20_000, bias=False, dtype=torch.float64))
    exact.linear.weight.data.copy_(head.linear.weight)
    truth, slope = naive_mean(hidden.double(), exact)
    torch.testing.assert_close(values.double(), truth, rtol=1e-6, atol=0)
    assert gradient.dtype == torch.float32
    assert (gradient.double() - slope).norm() / slope.norm() < 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("gemma2", {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}),
    ],
)
def test_heads_know_logit_scaling_and_soft_capping(family: str, options: dict[str, Any]) -> None:
    model, tokens = tiny_model(family, **options), tiny_tokens(1)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(Head.of(model).logits(hidden[0]), expected[0], rtol=1e-10, atol=1e-12)


def test_an_unknown_head_is_refused_instead_of_ignored() -> None:
    model = tiny_model("llama")
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.5 * original(hidden)
    with pytest.raises(UserError, match="head has a step that hifiprune does not know"):
        BlockChain(model)
