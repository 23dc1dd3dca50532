"""Objectives and their gradients against naive formulas in float64, and heads against the models' own logits."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hifiprune.engine import lm_head as head_module
from hifiprune.engine.context import frozen
from hifiprune.engine.hooks import Activations
from hifiprune.engine.lm_head import Head
from hifiprune.engine.sliced_objective import Kernel, Rows, mean_over_positions
from hifiprune.engine.verify import verified_chain
from hifiprune.errors import UserError
from hifiprune.scoring.objectives import CrossEntropy, Distillation, Entropy, SampledLabel, entropy_
from tests.families import tiny_model, tiny_tokens
from tests.naive import Loss, distillation_loss, divergence, drawn_labels, labels_loss, mean_entropy, next_token_loss

KERNELS: tuple[Kernel, ...] = (
    Entropy(),
    CrossEntropy(),
    Distillation(0.42, 0.5),
    Distillation(0.9, 3.0),
    SampledLabel(5),
    SampledLabel(7, 2, 3),
)


def make_head(vocabulary: int, width: int, dtype: torch.dtype = torch.float64, **options: Any) -> Head:
    torch.manual_seed(3)
    return Head(
        nn.Linear(width, vocabulary, bias=bool(options.pop("bias", 0)), dtype=dtype).requires_grad_(False), **options
    )


def make_tokens(hidden: Tensor, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, hidden.shape[:2], generator=torch.Generator().manual_seed(1))


def naive_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = head.linear(hidden) * head.scale
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def naive_loss(kernel: Kernel, logits: Tensor, teacher: Tensor, window: int) -> Loss:
    match kernel:
        case CrossEntropy():
            return next_token_loss
        case Distillation():
            return distillation_loss(teacher, kernel.alpha, kernel.temperature)
        case SampledLabel():
            return labels_loss(drawn_labels(kernel, logits, window))
    return mean_entropy


def naive_mean(
    kernel: Kernel, hidden: Tensor, head: Head, tokens: Tensor, teacher: Tensor, first_window: int = 0
) -> tuple[Tensor, Tensor]:
    """Value of each window, and the gradient by autograd through all logits at once."""
    hidden = hidden.detach().requires_grad_()
    values = []
    for number, (states, guide) in enumerate(zip(hidden, teacher, strict=True)):
        logits = naive_logits(states, head)
        loss = naive_loss(kernel, logits, naive_logits(guide, head), first_window + number)
        values.append(loss(logits, tokens[number]))
    (gradient,) = torch.autograd.grad(torch.stack(values).sum(), hidden)
    return torch.stack(values).detach(), gradient


@given(
    windows=st.integers(1, 3),
    positions=st.integers(2, 13),
    vocabulary=st.integers(2, 50),
    slice_rows=st.integers(1, 20),
    cache_rows=st.integers(1, 20),
    first_window=st.integers(0, 5),
    cap=st.sampled_from([None, 2.5]),
    scale=st.sampled_from([1.0, 0.25]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_sliced_objectives_equal_the_naive_formulas(
    windows: int,
    positions: int,
    vocabulary: int,
    slice_rows: int,
    cache_rows: int,
    first_window: int,
    cap: float | None,
    scale: float,
    bias: bool,
) -> None:
    head = make_head(vocabulary, 7, cap=cap, scale=scale, bias=bias)
    hidden, teacher = 5 * torch.randn(2, windows, positions, 7, dtype=torch.float64)
    tokens = make_tokens(hidden, vocabulary)
    with patch.object(head_module, "CACHE_BYTES", 4 * vocabulary * cache_rows):
        found = mean_over_positions(
            KERNELS, hidden, head, tokens, teacher=teacher, first_window=first_window, slice_rows=slice_rows
        )
    for kernel, (values, gradient) in zip(KERNELS, found, strict=True):
        expected_values, expected_gradient = naive_mean(kernel, hidden, head, tokens, teacher, first_window)
        torch.testing.assert_close(values, expected_values, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_objectives_asked_for_together_are_bitwise_those_asked_for_alone(order: slice) -> None:
    head = make_head(37, 7, cap=4.0)
    hidden, teacher = torch.randn(2, 2, 9, 7, dtype=torch.float64)
    options = {"teacher": teacher, "slice_rows": 4}
    tokens, kernels = make_tokens(hidden, 37), KERNELS[order]
    together = mean_over_positions(kernels, hidden, head, tokens, **options)
    for kernel, found in zip(kernels, together, strict=True):
        (alone,) = mean_over_positions([kernel], hidden, head, tokens, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("kernel", KERNELS[:4], ids=str)
def test_gradients_equal_finite_differences(kernel: Kernel) -> None:
    head = make_head(23, 5, cap=4.0, scale=0.5)
    hidden, teacher = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    tokens = make_tokens(hidden, 23)

    def total(hidden: Tensor) -> Tensor:
        return mean_over_positions([kernel], hidden, head, tokens, teacher=teacher)[0][0].sum()

    ((_, gradient),) = mean_over_positions([kernel], hidden, head, tokens, teacher=teacher)
    step = 1e-6
    for index in range(hidden.numel()):
        nudge = torch.zeros(hidden.numel(), dtype=torch.float64)
        nudge[index] = step
        nudge = nudge.view_as(hidden)
        slope = (total(hidden + nudge) - total(hidden - nudge)).item() / (2 * step)
        assert slope == pytest.approx(gradient.view(-1)[index].item(), abs=1e-8)


@pytest.mark.parametrize("kernel", [CrossEntropy(), Distillation(0.0, 1.0)], ids=str)
def test_a_window_of_one_position_has_no_next_token_to_predict(kernel: Kernel) -> None:
    hidden = torch.randn(2, 1, 5)
    head = make_head(23, 5, torch.float32)
    ((values, gradient),) = mean_over_positions([kernel], hidden, head, make_tokens(hidden, 23), teacher=hidden)
    assert torch.equal(values, torch.zeros(2))
    assert torch.equal(gradient, torch.zeros(2, 1, 5))


def near(logits: Tensor) -> Tensor:
    return logits + 0.01 * logits.std() * torch.randn_like(logits)


def far(logits: Tensor) -> Tensor:
    return logits.flip(-1)


def naive_rows(kernel: Kernel, logits: Tensor, labels: Tensor, weights: Tensor, teacher: Tensor) -> Tensor:
    """Values of a kernel, one a position, by torch's own functions."""
    hard = functional.cross_entropy(logits, labels, reduction="none")
    match kernel:
        case CrossEntropy():
            return weights * hard
        case Distillation():
            soft = divergence(teacher / kernel.temperature, logits)
            return (1 - kernel.alpha) * weights * hard + kernel.alpha * soft
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def naive_kernel(kernel: Kernel, logits: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    values = naive_rows(kernel, logits, *inputs)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


@pytest.mark.parametrize("make_teacher", [near, far])
@pytest.mark.parametrize("kernel", KERNELS[:4], ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_float32_errors_are_no_worse_than_the_naive_formulas(
    spread: float, kernel: Kernel, make_teacher: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    logits = spread * torch.randn(64, 5000)
    labels, weights, teacher = torch.randint(5000, (64,)), torch.full((64,), 64 / 63), make_teacher(logits)
    truth, slope = naive_kernel(kernel, logits.double(), labels, weights.double(), teacher.double())
    naive, naive_slope = naive_kernel(kernel, logits, labels, weights, teacher)
    # the divergence is a difference of log-normalisers, which are as large as the logits
    rounding = 4 * torch.finfo(torch.float32).eps * logits.abs().max() if isinstance(kernel, Distillation) else 1e-7
    ours = kernel(Rows(logits, labels, weights, teacher, 0, 0, 64))
    assert (ours - truth).abs().max() <= 2 * (naive - truth).abs().max() + rounding
    assert (logits - slope).abs().max() <= 2 * (naive_slope - slope).abs().max() + 1e-9


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
    tokens = make_tokens(hidden, 20_000)
    ((values, gradient),) = mean_over_positions([Entropy()], hidden, head, tokens)
    exact = Head(nn.Linear(16, 20_000, bias=False, dtype=torch.float64))
    exact.linear.weight.data.copy_(head.linear.weight)
    truth, slope = naive_mean(Entropy(), hidden.double(), exact, tokens, hidden.double())
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
        verified_chain(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_distilling_a_model_into_itself_has_a_gradient_of_exactly_zero(dtype: torch.dtype, cap: float | None) -> None:
    head = make_head(61, 7, dtype, cap=cap)
    hidden = 5 * torch.randn(3, 11, 7).to(dtype)
    same, warm, mixed = mean_over_positions(
        [Distillation(1.0, 1.0), Distillation(1.0, 0.5), Distillation(0.5, 1.0)],
        hidden,
        head,
        make_tokens(hidden, 61),
        teacher=hidden.clone(),
        slice_rows=4,
    )
    assert torch.equal(same[1], torch.zeros_like(same[1]))
    torch.testing.assert_close(same[0], torch.zeros_like(same[0]), rtol=0, atol=1e-4)
    assert warm[1].abs().min() > 0
    assert mixed[1][:, :-1].abs().min() > 0
    assert torch.equal(mixed[1][:, -1], torch.zeros_like(mixed[1][:, -1]))  # no token follows the last position


@pytest.mark.parametrize("variant", ["llama", "gemma2", "llama-bias"])
@pytest.mark.parametrize("recompute", [False, True])
def test_self_distillation_at_zero_pruning_has_exactly_zero_gradient_everywhere(variant: str, recompute: bool) -> None:
    model, tokens = tiny_model(variant, torch.float32), tiny_tokens()
    slopes: dict[tuple[int, int], Tensor] = {}

    def keep(seen: Activations) -> None:
        if seen.kernel is not None and seen.gradient is not None:
            slopes[seen.layer, seen.kernel] = seen.gradient.clone()

    with frozen(model):
        chain = verified_chain(model)
        _, teacher = chain.sweep(tokens, [], lambda seen: None)
        kernels = [Distillation(1.0, 1.0), Distillation(1.0, 0.5)]
        chain.sweep(tokens, kernels, keep, recompute=recompute, teacher=teacher)
    assert sorted(slopes) == [(layer, kernel) for layer in range(3) for kernel in range(2)]
    for layer in range(3):
        assert torch.equal(slopes[layer, 0], torch.zeros(3, 11, 40))
        assert (slopes[layer, 1] != 0).any(-1).all()  # a teacher of another temperature moves every position
