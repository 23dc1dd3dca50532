"""The contract that every supported family keeps: exact invariants on a tiny random model."""

import copy
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune import score
from hifiprune.config.groups import CriterionOptions
from hifiprune.engine.context import frozen
from hifiprune.engine.hooks import Activations
from hifiprune.engine.verify import verified_chain
from hifiprune.models.families import FAMILIES
from hifiprune.models.mlp import find_mlps
from hifiprune.plan import Plan, proportional_width
from hifiprune.pruning.cut import cut_
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import CRITERIA
from hifiprune.scoring.objectives import Entropy
from hifiprune.scoring.score import score_all
from tests.families import VARIANTS, load, tiny_model, tiny_tokens
from tests.naive import masked_logits, recorded_activations

Pairs = dict[int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contract:
    """A tiny model of a variant and what is known of it; tests that change a model take a copy.

    Attributes:
        model: model, in float64, never changed.
        tokens: windows of calibration data.
        entropies: mean entropy of each window, by plain transformers.
        pairs: activations and their gradients by MLP, by autograd through the whole model.
        logits: logits of the tokens.
        scores: scores of the default criterion.
    """

    model: PreTrainedModel
    tokens: Tensor
    entropies: Tensor
    pairs: Pairs
    logits: Tensor
    scores: Scores

    def copy(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """Return a model of its own."""
        model: Any = copy.deepcopy(self.model)
        converted: PreTrainedModel = model.to(dtype)
        return converted


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def contract(variant: str) -> Contract:
    model, tokens = tiny_model(variant), tiny_tokens()
    return Contract(model, tokens, *naive_sweep(model, tokens), logits_of(model, tokens), score(model, tokens))


def test_every_family_has_a_variant() -> None:
    assert {name.split("-")[0] for name in VARIANTS} == set(FAMILIES)


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def plan_keeping(model: PreTrainedModel, kept: list[Tensor]) -> Plan:
    mlps = find_mlps(model)
    return Plan(kept, [mlp.neurons for mlp in mlps], [mlp.name for mlp in mlps], None, 0.0, 0, 0)


def random_plan(model: PreTrainedModel, width: int) -> Plan:
    chance = torch.Generator().manual_seed(5)
    sizes = [mlp.neurons for mlp in find_mlps(model)]
    widths = [proportional_width(width, mode(sizes), neurons) for neurons in sizes]
    orders = (torch.randperm(neurons, generator=chance) for neurons in sizes)
    return plan_keeping(model, [order[:own].sort().values for order, own in zip(orders, widths, strict=True)])


def naive_sweep(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Pairs]:
    """Full logits, one graph, plain formula, hooks."""
    with recorded_activations(model) as activations:
        probs = model(input_ids=tokens, use_cache=False).logits.softmax(-1)
        values = -(probs * probs.log()).sum(-1).mean(-1)
    gradients = torch.autograd.grad(values.sum(), activations)
    found = zip(activations, gradients, strict=True)
    return values.detach(), {
        number: tuple(each.detach().view(*tokens.shape, -1) for each in pair) for number, pair in enumerate(found)
    }


def chain_sweep(model: PreTrainedModel, tokens: Tensor, *, recompute: bool) -> tuple[Tensor, Pairs]:
    pairs: Pairs = {}

    def keep(seen: Activations) -> None:
        if seen.gradient is not None:
            pairs[seen.layer] = (seen.activation.clone(), seen.gradient.clone())

    with frozen(model):
        (values,), _ = verified_chain(model).sweep(tokens, [Entropy()], keep, recompute=recompute)
    return values, pairs


@pytest.mark.parametrize("recompute", [False, True])
def test_sweep_equals_autograd_through_the_whole_model(contract: Contract, recompute: bool) -> None:
    values, seen = chain_sweep(contract.model, contract.tokens, recompute=recompute)
    torch.testing.assert_close(values, contract.entropies, rtol=1e-10, atol=1e-12)
    assert sorted(seen) == sorted(contract.pairs)
    mlps = find_mlps(contract.model)
    for layer, (activation, gradient) in contract.pairs.items():
        torch.testing.assert_close(seen[layer][0], activation, rtol=1e-10, atol=1e-12)
        told = activation.any(-1, keepdim=True) if mlps[layer].is_expert else 1  # of tokens that it did not see
        torch.testing.assert_close(seen[layer][1], gradient * told, rtol=1e-8, atol=1e-13)


def test_the_model_is_left_as_it_was(contract: Contract) -> None:
    model, before = contract.copy().train(), dict(contract.model.named_parameters())
    score(model, contract.tokens)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_batched_scores_equal_single_ones(contract: Contract) -> None:
    batched = score(contract.model, contract.tokens, batch_size=2)
    for one, other in zip(contract.scores.values, batched.values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_keeping_all_neurons_changes_no_bit(contract: Contract) -> None:
    model = contract.copy(torch.float32)
    before = logits_of(model, contract.tokens)
    cut_(model, plan_keeping(model, [torch.arange(mlp.neurons) for mlp in find_mlps(model)]))
    assert torch.equal(logits_of(model, contract.tokens), before)


def test_cutting_equals_setting_activations_to_zero(contract: Contract) -> None:
    model, plan = contract.copy(), random_plan(contract.model, 17)
    masked = masked_logits(contract.model, plan, contract.tokens)
    assert not torch.allclose(masked, contract.logits)
    cut_(model, plan)
    torch.testing.assert_close(logits_of(model, contract.tokens), masked, rtol=1e-10, atol=1e-12)


def test_permuting_the_neurons_permutes_the_scores(contract: Contract) -> None:
    model, chance = contract.copy(), torch.Generator().manual_seed(7)
    orders = [torch.randperm(mlp.neurons, generator=chance) for mlp in find_mlps(model)]
    with torch.no_grad():
        for mlp, order in zip(find_mlps(model), orders, strict=True):
            for linear in mlp.inputs:
                linear.weight.copy_(linear.weight[order].clone())
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[order].clone())
            mlp.output.weight.copy_(mlp.output.weight[:, order].clone())
    after = score(model, contract.tokens)
    for one, other, order in zip(contract.scores.values, after.values, orders, strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_model_reloads_without_our_code(contract: Contract, dtype: torch.dtype, tmp_path: Path) -> None:
    contract.copy(dtype).save_pretrained(tmp_path / "dense")
    model, tokens = load(tmp_path / "dense", dtype="auto"), contract.tokens
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    stated = bool(FAMILIES[model.config.model_type].width)
    plan = random_plan(model, 24)
    cut_(model, plan)
    model.save_pretrained(tmp_path)
    how: Any = {"dtype": "auto", "output_loading_info": True, "trust_remote_code": not stated}
    loaded: Any = load(tmp_path, **how)
    again, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert [mlp.neurons for mlp in find_mlps(again)] == plan.widths  # as the configuration says too
    assert all(mlp.neurons == linear.out_features for mlp in find_mlps(again) for linear in mlp.inputs)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    assert again.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape[1] > tokens.shape[1]


def test_only_where_it_is_said_a_norm_or_factor_follows_the_mlp(contract: Contract) -> None:
    chain, hidden_size = verified_chain(contract.model), contract.model.config.get_text_config().hidden_size
    more = 0.1 * torch.arange(1.0, 1 + hidden_size, dtype=torch.float64)
    hidden, calls = chain.embed(contract.tokens)
    before, _ = chain.run(1, hidden, calls[1])
    writes = chain.blocks[1].get_submodule(chain.family.mlp) if chain.family.mlp else chain.mlps[1].output.module
    handle = writes.register_forward_hook(lambda _, __, output: output + more)
    with torch.no_grad():
        output = chain.blocks[1](hidden, *calls[1].args, **calls[1].kwargs)
    handle.remove()
    after = output[0] if chain.family.returns_tuple else output
    assert torch.allclose(after - before, more.expand_as(before)) == chain.family.additive


@pytest.mark.by_layout
def test_every_criterion_gives_finite_scores(contract: Contract) -> None:
    model = contract.copy(torch.float32)
    found = score_all(model, tiny_tokens(4), [(name, CriterionOptions()) for name in CRITERIA])
    assert [scores.criterion for scores in found] == [*CRITERIA]
    for scores in found:
        scores.require_finite()
        assert [len(values) for values in scores.values] == [mlp.neurons for mlp in find_mlps(model)]


@pytest.mark.by_layout
@pytest.mark.parametrize("recompute", [False, True])
def test_half_precision_weights_score_near_the_truth(variant: str, recompute: bool) -> None:
    model, tokens = tiny_model(variant, torch.bfloat16), tiny_tokens()
    truth = score(tiny_model(variant, torch.bfloat16).double(), tokens)
    found = score(model, tokens, recompute=recompute)
    pairs = zip(found.values, truth.values, strict=True)
    near = torch.tensor([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    routed = bool(FAMILIES[model.config.model_type].experts)  # where a near tie sends a token to another expert
    assert near.median() > (0.95 if routed else 0.99)
