"""The loss of recovery training against transformers' own, and against plain formulas under autograd in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.objectives import SoftLabels
from hifiprune.packing import IGNORED
from hifiprune.training_loss import Teacher, sliced_loss
from tests.families import VARIANTS, tiny_model, tiny_tokens


def batch(windows: int = 3, positions: int = 11) -> dict[str, Tensor]:
    tokens = tiny_tokens(windows, positions)
    labels = tokens.clone()
    labels[:, :4] = IGNORED
    labels[1] = IGNORED
    return {"input_ids": tokens, "position_ids": torch.arange(positions).expand(windows, -1), "labels": labels}


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model: PreTrainedModel, ours: Tensor, theirs: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs.to(ours), rtol=rtol, atol=0)
    found = gradients_of(model, ours)
    expected = gradients_of(model, theirs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=1e-3 * rtol)


def loss_of(model: PreTrainedModel, kernel: SoftLabels, teacher: Teacher | None = None, **more: Any) -> Tensor:
    with sliced_loss(model.train(), kernel, teacher):
        loss: Tensor = model(**batch(), **more).loss
    model.eval()
    return loss


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [None, 31])
def test_cross_entropy_is_transformers_own(variant: str, count: int | None) -> None:
    model = tiny_model(variant)
    more: dict[str, Any] = {} if count is None else {"num_items_in_batch": count}
    theirs = model(**batch(), **more, use_cache=False).loss  # of logits in float32
    assert_same(model, loss_of(model, SoftLabels(0.0), **more), theirs, rtol=1e-4)


def plain_distillation(student: PreTrainedModel, dense: PreTrainedModel, share: float, heat: float) -> Tensor:
    given = batch()
    labels = given.pop("labels")[:, 1:]
    learned = labels != IGNORED
    logits = student(**given, use_cache=False).logits[:, :-1][learned]
    with torch.no_grad():
        target = dense(**given, use_cache=False).logits[:, :-1][learned]
    soft = functional.kl_div((logits / heat).log_softmax(-1), (target / heat).softmax(-1), reduction="batchmean")
    return (1 - share) * functional.cross_entropy(logits, labels[learned]) + share * heat**2 * soft


@pytest.mark.parametrize("variant", ["llama-tied", "gemma2", "qwen3"])
@pytest.mark.parametrize(("share", "heat"), [(1.0, 1.0), (0.4, 1.0), (1.0, 2.5), (0.3, 0.7)])
def test_distillation_is_the_naive_formula(variant: str, share: float, heat: float) -> None:
    student, dense = tiny_model(variant, intermediate_size=24), tiny_model(variant, seed=4)
    ours = loss_of(student, SoftLabels(share, heat), Teacher(dense))
    assert_same(student, ours, plain_distillation(student, dense, share, heat))


def test_distilling_from_itself_has_no_loss_and_moves_nothing() -> None:
    model = tiny_model("llama-tied")
    loss = loss_of(model, SoftLabels(1.0), Teacher(tiny_model("llama-tied")))
    assert abs(loss.item()) < 1e-12
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients_of(model, loss).values())


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = tiny_model("llama-tied"), Teacher(tiny_model("llama-tied", seed=4))
    whole = gradients_of(model, loss_of(model, SoftLabels(0.5), teacher))
    monkeypatch.setattr("hifiprune.head.SLICE_BYTES", 0)
    monkeypatch.setattr("hifiprune.head.SLICE_ROWS", 5)
    for name, gradient in gradients_of(model, loss_of(model, SoftLabels(0.5), teacher)).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


def test_frozen_heads_get_no_gradient_and_none_is_made() -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in gradients_of(model, loss_of(model, SoftLabels(0.0)))


def test_the_model_is_itself_again_after() -> None:
    model = tiny_model("llama")
    before = model(**batch()).loss
    loss_of(model, SoftLabels(0.0))
    assert torch.equal(model(**batch()).loss, before)


def test_an_evaluated_model_gives_the_cross_entropy_of_each_row() -> None:
    model, given = tiny_model("gemma2"), batch()
    with sliced_loss(model, SoftLabels(1.0), Teacher(tiny_model("gemma2", seed=4))):
        found = model(**given)
    logits = model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), given["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(found.logits[:, 0], losses.sum(1))
    assert found.logits[:, 1].tolist() == [7, 0, 7]
    assert found.loss.item() == pytest.approx(losses.sum().item() / 14)
