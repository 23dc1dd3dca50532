"""What the scores mean, and how scoring refuses what it cannot do."""

import copy
import hashlib
from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hifiprune import RunError, UserError, score
from hifiprune.engine.context import check_windows
from hifiprune.engine.hooks import Activations
from hifiprune.io import hashing as hashing_module
from hifiprune.io.hashing import hash_chunks, hash_model, hashing
from hifiprune.models.mlp import find_mlps
from hifiprune.scoring.neuron_statistics import absolute, moments, square
from tests.families import tiny_model, tiny_tokens


def entropies(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        probs = model(input_ids=tokens, use_cache=False).logits.softmax(-1)
    entropy: Tensor = -(probs * probs.log()).sum(-1).mean(-1)
    return entropy


def exact_norms_(model: torch.nn.Module) -> None:
    """Keep the norms in float64, where transformers computes them in float32: finite differences need the digits."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: m.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize(("layer", "neuron"), [(0, 3), (1, 0), (2, 39)])
def test_the_score_predicts_the_change_of_entropy_to_first_order(layer: int, neuron: int) -> None:
    """Scale one neuron by (1 - epsilon) at one position at a time and add up how much the real entropy moves."""
    model, tokens = tiny_model("llama"), tiny_tokens(windows=2, positions=7)
    exact_norms_(model)
    predicted = score(model, tokens, "entropy", batch_size=2).values[layer][neuron].item()
    linear, epsilon, measured = find_mlps(model)[layer].output, 1e-5, 0.0
    for position in range(tokens.shape[1]):

        def weaken(_: torch.nn.Module, arguments: tuple[Tensor], factor: float, position: int = position) -> Tensor:
            activation = arguments[0].clone()
            activation[:, position, neuron] *= factor
            return activation

        changed = []
        for factor in (1 - epsilon, 1 + epsilon):
            hook = linear.module.register_forward_pre_hook(lambda m, a, factor=factor: weaken(m, a, factor))
            changed.append(entropies(model, tokens))
            hook.remove()
        measured += (changed[1] - changed[0]).abs().sum().item() / (2 * epsilon)
    assert predicted == pytest.approx(measured, rel=1e-5)
    assert predicted > 1e-6


def test_a_neuron_that_writes_nothing_scores_zero() -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        find_mlps(model)[1].output.weight[:, 5] = 0
    scores = score(model, tiny_tokens())
    assert scores.values[1][5] == 0
    assert (scores.values[1] > 0).sum() == 39


def test_the_mean_objective_is_the_models_entropy() -> None:
    model, tokens = tiny_model("qwen3"), tiny_tokens()
    assert score(model, tokens).objective == pytest.approx(entropies(model, tokens).mean().item(), rel=1e-10)


def test_scores_add_up_over_windows_in_any_order() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(windows=4)
    whole, first, second = (score(model, part) for part in (tokens.flip(0), tokens[:2], tokens[2:]))
    for all_of, one, other in zip(whole.values, first.values, second.values, strict=True):
        torch.testing.assert_close(all_of, one + other, rtol=1e-6, atol=0)


def test_the_same_call_gives_the_same_bytes() -> None:
    first, second = (score(tiny_model("mistral", torch.float32), tiny_tokens()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values, strict=True))
    assert (first.model_hash, first.data_hash) == (second.model_hash, second.data_hash)


def test_hfprune_and_entropy_are_the_same() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    first, second = score(model, tokens, "hfprune"), score(model, tokens, "entropy")
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values, strict=True))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_infinite_activations_stop_the_run_and_name_the_block(layer: int) -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        find_mlps(model)[layer].output.weight[0, 0] = float("inf")
    with pytest.raises(RunError, match=f"decoder block {layer} of 3 are NaN or infinite in torch.float32"):
        score(model, tiny_tokens())


@pytest.mark.parametrize("waits", [False, True], ids=["asked at once", "asked at the end"])
@pytest.mark.parametrize("window", [0, 2])
def test_overflow_anywhere_in_the_data_is_found(window: int, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.scoring.accumulate.waits", lambda _: waits)
    model, tokens = tiny_model("llama", torch.float32), tiny_tokens().clamp(max=59)
    tokens[window, 3] = 60
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[60] = float("nan")
        with pytest.raises(RunError, match="decoder block 0"):
            score(model, tokens)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.int64), "windows must be integer token ids"),
        (torch.zeros(5, dtype=torch.int64), r"integer token ids \[windows, positions\], not torch.int64 \[5\]"),
        (torch.zeros(2, 5), r"integer token ids \[windows, positions\], not torch.float32 \[2, 5\]"),
        (torch.tensor([[1, 61]]), "token ids must lie in 0 to 60; found 1 to 61"),
        (torch.tensor([[-1, 3]]), "token ids must lie in 0 to 60; found -1 to 3"),
    ],
)
def test_unusable_windows_are_refused(windows: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_windows(tiny_model("llama"), windows, 1)


def test_late_small_terms_are_not_lost_in_bfloat16() -> None:
    """A thousand products of 1 after one of 256: a bfloat16 sum would stay at 256."""
    activation = torch.ones(1, 1001, 2, dtype=torch.bfloat16)
    gradient = -torch.ones(1, 1001, 2, dtype=torch.bfloat16)
    activation[0, 0] = 256
    assert absolute(Activations(0, 0, activation, gradient.clone())).tolist() == [[1256.0, 1256.0]]
    assert square(Activations(0, 0, activation, gradient.clone())).tolist() == [[66536.0, 66536.0]]
    assert moments(Activations(0, None, activation)).tolist() == [[1256.0] * 2, [66536.0] * 2]


def test_float16_gradients_do_not_vanish() -> None:
    """Gradients of a mean over many positions lie below float16's range unless they are scaled."""
    torch.manual_seed(4)
    tokens = torch.randint(61, (1, 64))
    half = tiny_model("llama", torch.float16)
    with torch.no_grad():
        half.get_parameter("lm_head.weight").mul_(0.01)  # small gradients, as a long window has
    found, exact = score(half, tokens), score(copy.deepcopy(half).double(), tokens)
    for one, other in zip(found.values, exact.values, strict=True):
        assert (one - other).abs().max() < 0.1 * other.max()


def test_windows_longer_than_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="windows must have 1 to 64 positions, not 65"):
        score(tiny_model("llama"), torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(UserError, match=r"LlamaModel has no model.layers; give the causal language model"):
        find_mlps(tiny_model("llama").model)


def test_unknown_criteria_and_architectures_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"criterion 'entrpy' is not known.*did you mean 'entropy'"):
        score(tiny_model("llama"), tiny_tokens(), "entrpy")
    mamba: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", num_hidden_layers=1, hidden_size=24))
    with pytest.raises(UserError, match=r"model type 'mamba' is not in the table .* holds mixer.in_proj "):
        score(mamba, tiny_tokens())


def test_a_variant_without_a_last_norm_is_refused() -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(UserError, match=r"OPTForCausalLM has no model\.decoder\.final_layer_norm"):
        score(model, tiny_tokens())


def test_model_hashes_follow_the_values_not_the_dtype() -> None:
    half = tiny_model("llama", torch.bfloat16)
    before = hash_model(half)
    assert before == hash_model(half.float())
    with torch.no_grad():
        find_mlps(half)[0].inputs[1].weight[0, 0] += 1e-3
    assert before != hash_model(half)


def test_a_hash_is_that_of_all_bits_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.cat([torch.ones(20), torch.rand(30)])  # of the first, the lower halves are 0
    bits = values.numpy().view(np.uint32)
    upper = hashlib.sha256(b"a [50]\n" + (bits >> 16).astype(np.uint16).tobytes()).digest()
    lower = hashlib.sha256((bits & 0xFFFF).astype(np.uint16).tobytes()).digest()
    expected = hashlib.sha256(upper + lower).hexdigest()
    for size in (1, 7, 64):
        monkeypatch.setattr(hashing_module, "CHUNK", size)
        for chunks in ([values], values.split(13)):
            assert hash_chunks([("a", [50], chunks)]) == expected
    rounded = values.bfloat16()
    assert hash_chunks([("a", [50], [rounded])]) == hash_chunks([("a", [50], [rounded.double()])]) != expected


def test_weights_are_hashed_while_others_work() -> None:
    started = Event()

    def chunks() -> Iterator[torch.Tensor]:
        started.set()
        yield torch.ones(3)

    with hashing([("a", [3], chunks())]) as result:
        assert started.wait(10)
        assert result() == hash_chunks([("a", [3], [torch.ones(3)])])
