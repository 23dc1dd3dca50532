"""Operations of a pass that a GPU would launch, counted on the meta device beside those of plain autograd."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hifiprune.config.groups import CriterionOptions
from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.hooks import Activations, float32_product
from hifiprune.engine.lm_head import PART, Head, rows_of_slice
from hifiprune.engine.memory import Graphs
from hifiprune.models.detect import settled_family
from hifiprune.models.mlp import find_mlps
from hifiprune.scoring.accumulate import Pass, PassConfig
from hifiprune.scoring.neuron_statistics import square
from hifiprune.scoring.score import passes_of
from tests.naive import mean_entropy
from tests.test_waiting import on_meta, without_waiting

WINDOWS = 3
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "prim::device", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "empty",
    "empty_like", "new_empty", "promote_types", "device",
}  # fmt: skip
"""Operations that launch nothing."""


class Launches(TorchDispatchMode):
    """Counts the operations that make a GPU work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name.partition("::")[2]
        self.names[name] += name not in VIEWS
        return operation(*args, **kwargs or {})


class Unread(Pass):
    """A pass whose sums nobody asks for."""

    def _require_finite(self, batches: Sequence[Tensor]) -> None:
        pass


def model_of(layers: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 300}
    return on_meta(
        LlamaForCausalLM._from_config(LlamaConfig(**sizes, num_hidden_layers=layers, dtype=torch.bfloat16)).eval()
    )


def scored(layers: int, criterion: str, graphs: Graphs) -> int:
    model = model_of(layers)
    jobs = passes_of([(criterion, CriterionOptions())])[0]
    run = Unread(BlockChain(model, settled_family(model.config)), tokens(), PassConfig(1, graphs))
    with Launches() as launches:
        run.run(jobs)
    return sum(launches.names.values())


def differentiated(layers: int, *, forward_only: bool = False) -> int:
    """Plain autograd to the activations of all MLPs, without weight gradients and without a statistic of them."""
    model = model_of(layers)
    activations: list[Tensor] = []

    def note(module: nn.Module, values: tuple[Tensor]) -> tuple[Tensor]:
        activations.append(values[0] if values[0].requires_grad else values[0].detach().requires_grad_())
        return (activations[-1],)

    for mlp in find_mlps(model):
        mlp.output.module.register_forward_pre_hook(note)
    with Launches() as launches:
        for window in tokens().split(1):
            activations.clear()
            logits = model(input_ids=window.to("meta"), use_cache=False).logits
            if not forward_only:
                torch.autograd.grad(mean_entropy(logits.float(), window).sum(), activations)
    return sum(launches.names.values())


def tokens() -> Tensor:
    return torch.zeros(WINDOWS, 32, dtype=torch.int64)


@pytest.mark.parametrize(("criterion", "statistic"), [("hfprune", 3), ("entropy-square", 4)])
def test_a_block_launches_little_more_than_plain_autograd(
    criterion: str, statistic: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statistic is a product, a reduction, perhaps a square, and a sum; the first sum of a block is a copy."""
    without_waiting(monkeypatch)
    scored(1, criterion, Graphs(recompute=False))  # which makes what is made once
    forward = differentiated(4, forward_only=True) - differentiated(3, forward_only=True)
    both = differentiated(4) - differentiated(3)
    kept, again = (
        scored(4, criterion, graphs) - scored(3, criterion, graphs)
        for graphs in (Graphs(recompute=False), Graphs(recompute=True))
    )
    assert kept <= both + WINDOWS * statistic
    assert again <= both + forward + WINDOWS * statistic
    assert both > 100 * WINDOWS, "or nothing was counted"


def test_products_of_two_bytes_are_exact_in_float32() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        one, other = torch.randn(5, 7, 3, dtype=dtype), torch.randn(5, 7, 3, dtype=dtype)
        product = float32_product(one, other)
        assert product.dtype == torch.float32
        assert torch.equal(product.double(), one.double() * other.double())


def test_a_gpus_sum_of_squares_is_the_cpus() -> None:
    torch.manual_seed(0)

    class OnGpu(Tensor):
        device = torch.device("cuda")

    seen = Activations(0, 0, torch.randn(2, 9, 5), torch.randn(2, 9, 5))
    wanted = square(seen)
    seen.taylor = seen.taylor.as_subclass(OnGpu)
    torch.testing.assert_close(square(seen).as_subclass(Tensor), wanted, rtol=1e-6, atol=0)


def test_a_gpu_takes_a_window_of_logits_at_once() -> None:
    gpu, cpu, vocabulary = torch.device("cuda"), torch.device("cpu"), 32_000
    assert rows_of_slice(vocabulary, gpu) == 1048
    assert rows_of_slice(vocabulary, cpu) == 196
    assert rows_of_slice(128_256, gpu) == 261
    weights = [nn.Linear(1, 3 * PART, bias=False, device=device) for device in ("meta", "cpu")]
    parts = [[len(part) for _, part in Head(weight)._weight(weight.weight.device)] for weight in weights]
    assert parts == [[3 * PART], [PART] * 3]
