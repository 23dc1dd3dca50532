"""A model that is cut for a while: smaller within, bit for bit the same after."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune import UserError, cut_, score
from hifiprune.engine.temporary_cut import cut
from hifiprune.models import neuron_slices
from hifiprune.models.mlp import find_mlps, width_of
from hifiprune.plan import Plan
from tests.families import FORMS, ROUTED, tiny_model, tiny_tokens
from tests.naive import logits_of
from tests.test_families import plan_keeping, random_plan


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sizes_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that states a width: shapes, the features of the projections, the configuration."""
    linears = [linear for mlp in find_mlps(model) for linear in (*mlp.inputs, mlp.output)]
    return {
        "shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "features": [(linear.in_features, linear.out_features) for linear in linears],
        "configured": width_of(model.config),
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
    }


def assert_unchanged(model: PreTrainedModel, state: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    assert sizes_of(model) == sizes
    after = state_of(model)
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("variant", FORMS + ROUTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_cut_within_and_bitwise_whole_after(variant: str, dtype: torch.dtype) -> None:
    model, tokens = tiny_model(variant, dtype), tiny_tokens()
    next(find_mlps(model)[1].output.module.parameters()).requires_grad_(False)
    state, sizes, before = state_of(model), sizes_of(model), logits_of(model, tokens).detach()
    plan = random_plan(model, 17)
    for_good = tiny_model(variant, dtype)
    next(find_mlps(for_good)[1].output.module.parameters()).requires_grad_(False)
    cut_(for_good, plan)
    with cut(model, plan):
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in state.values())
        assert [mlp.neurons for mlp in find_mlps(model)] == plan.widths
        assert_unchanged(model, state_of(for_good), sizes_of(for_good))
        assert torch.equal(logits_of(model, tokens), logits_of(for_good, tokens))
        assert not torch.allclose(logits_of(model, tokens), before)
    assert_unchanged(model, state, sizes)
    assert torch.equal(logits_of(model, tokens), before)


def test_an_error_within_leaves_the_model_whole() -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)
    with pytest.raises(RuntimeError, match="interrupted at 17"), cut(model, random_plan(model, 17)):
        raise RuntimeError(f"interrupted at {width_of(model.config)}")
    assert_unchanged(model, state, sizes)


@pytest.mark.parametrize("stop", [0, 1, 4, 8, 14])
def test_an_interruption_while_it_is_cut_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)
    calls: list[Any] = []
    real = neuron_slices.Part.set_

    def interrupted(*given: Any) -> None:
        calls.append(given)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(neuron_slices.Part, "set_", interrupted)
    with pytest.raises(KeyboardInterrupt), cut(model, random_plan(model, 17)):
        pytest.fail("the cut was not interrupted")
    assert len(calls) == stop + 1 + stop, "what was cut is put back, and no more"
    assert_unchanged(model, state, sizes)


def test_gradients_survive_a_cut_for_a_while_and_not_one_for_good() -> None:
    model, tokens = tiny_model("llama-bias"), tiny_tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    score(model, tokens, "self-distillation")
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    cut_(model, random_plan(model, 17))
    before = state_of(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(after.shape == before[name].shape for name, after in model.named_parameters())
    assert not any(torch.equal(after, before[name]) for name, after in model.named_parameters())


def test_cuts_can_be_nested() -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)
    with cut(model, random_plan(model, 30)):
        inner_state, inner_sizes = state_of(model), sizes_of(model)
        with cut(model, random_plan(model, 7)):
            assert [mlp.neurons for mlp in find_mlps(model)] == [7] * 3
        assert_unchanged(model, inner_state, inner_sizes)
    assert_unchanged(model, state, sizes)


def test_a_cut_that_keeps_everything_changes_no_bit() -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)
    with cut(model, plan_keeping(model, [torch.arange(40)] * 3)):
        assert_unchanged(model, state, sizes)
    assert_unchanged(model, state, sizes)


@pytest.mark.parametrize(
    ("kept", "message"),
    [([torch.arange(9)] * 2, "the plan is for 2 MLPs"), ([torch.arange(9)] * 4, "the plan is for 4 MLPs")],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_cut(kept: list[Tensor], message: str) -> None:
    model = tiny_model("llama-bias")
    state, sizes = state_of(model), sizes_of(model)
    names = [f"model.layers.{layer}.mlp" for layer in range(len(kept))]
    plan = Plan(kept, [40] * len(kept), names, None, 0.0, 0, 0)
    with pytest.raises(UserError, match=message), cut(model, plan):
        pytest.fail("a plan for another model was carried out")
    assert_unchanged(model, state, sizes)
