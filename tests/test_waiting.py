"""A pass on an accelerator never waits for it, but where its sums are read.

The meta device stands for the accelerator: it takes every operation, and refuses what would need a value on the host.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hifiprune.config.groups import Budget, CriterionOptions
from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.hooks import places_of
from hifiprune.engine.memory import Graphs
from hifiprune.engine.offload import place
from hifiprune.engine.verify import verified_chain
from hifiprune.io.pass_checkpoint import PassCheckpoint
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.detect import settled_family
from hifiprune.pruning import repair
from hifiprune.pruning.allocate import allocate
from hifiprune.pruning.repair import cut_and_repair_
from hifiprune.pruning.ridge import HeldOut
from hifiprune.results import Refit
from hifiprune.scoring.accumulate import Pass, PassConfig
from hifiprune.scoring.score import passes_of, score
from tests.families import ROUTED, tiny_model, tiny_tokens

CRITERIA = ("hfprune", "entropy-square", "cross-entropy", "fisher", "self-distillation", "flap", "minitron")


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        place(model, name, values.to("meta"))
    return model.requires_grad_(False)


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out what transformers' own forward asks of each batch: whether it is packed or padded."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None)


class Unread(Pass):
    """A pass that notes when its sums would be read."""

    reads: list[int]

    def _require_finite(self, batches: Sequence[Tensor]) -> None:
        self.reads.append(len(batches))

    def _state(self) -> dict[str, Tensor]:
        self.reads.append(-self.done)
        return {"done": torch.tensor(self.done)}


@pytest.mark.parametrize(
    ("variant", "criterion", "recompute"),
    [
        *(("llama", criterion, False) for criterion in CRITERIA),
        *((variant, "hfprune", True) for variant in ("llama", "gpt2", "gemma2", "falcon")),
    ],
)
def test_a_pass_waits_for_no_batch(
    variant: str, criterion: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_waiting(monkeypatch)
    model = on_meta(tiny_model(variant, torch.bfloat16))
    chain = BlockChain(model, settled_family(model.config))
    first: list[Tensor] = []
    for jobs in passes_of([(criterion, CriterionOptions(alpha=0.5, temperature=1.0))]):
        run = Unread(chain, tiny_tokens(7), PassConfig(2, Graphs(recompute)))
        run.reads = []
        run.run(jobs, first, keep_hidden=not first)
        assert run.reads == [4], "once, at the end, for all batches"
        assert all(total.is_meta for found in run.totals.values() for total in found.values())
        assert all(state.is_meta for state in run.hidden), "no state goes to the host and back"
        first = run.hidden


def test_sums_are_read_for_looks_and_checkpoints_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_waiting(monkeypatch)
    monkeypatch.setattr("hifiprune.io.pass_checkpoint.COST", float("inf"))
    due = iter([False, True, False, False, False])
    monkeypatch.setattr(PassCheckpoint, "due", property(lambda _: next(due)))
    monkeypatch.setattr(PassCheckpoint, "write", lambda *_: None)
    model = on_meta(tiny_model("llama", torch.bfloat16))
    run = Unread(BlockChain(model, settled_family(model.config)), tiny_tokens(5), PassConfig())
    run.keeper, run.reads = PassCheckpoint(ResumeFolder(tmp_path / "unfinished")), []
    run.run(passes_of([("hfprune", CriterionOptions())])[0], looks=[4], settled=lambda _: False)
    assert run.reads == [2, -2, 2, 1], "a check and a state after two batches, a look after four, the end"


class Reads(TorchDispatchMode):
    """Counts operations that need a value on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operation)
        if name in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"):
            self.names[name] += 1
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ROUTED)
def test_experts_wait_once_a_block(variant: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without_waiting(monkeypatch)
    model, batches = tiny_model(variant, torch.bfloat16).requires_grad_(False), 3
    chain, jobs = verified_chain(model), passes_of([("hfprune", CriterionOptions())])[0]
    lists: list[int] = []

    def to_list(tensor: Tensor, whole: Any = Tensor.tolist) -> Any:
        lists.append(len(tensor))
        return whole(tensor)

    monkeypatch.setattr("hifiprune.scoring.accumulate.waits", lambda _: True)
    monkeypatch.setattr(Tensor, "tolist", to_list)
    with Reads() as reads:
        Pass(chain, tiny_tokens(batches), PassConfig(1, Graphs(recompute))).run(jobs)
    assert reads.names == {"aten._local_scalar_dense.default": 1}, "whether all sums are finite"
    experts = [sum(chain.mlps[number].is_expert for number in own) for own in chain.of_block]
    routing = [count for count in experts if count]
    again = routing[:-1] if recompute else []  # the last block's graph is kept
    assert sorted(lists) == sorted((routing + again) * batches), "a block's experts ask together"


def test_places_of_experts() -> None:
    chosen = torch.tensor([[2, 0], [0, 3], [5, 2]])  # 5 is no expert, as another process's are
    found = places_of(chosen, 5)
    assert [places.tolist() for places in found] == [[1, 2], [], [0, 5], [3], []]


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_repair_waits_for_no_batch(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moments come to: how many dampings are tried is left out."""
    without_waiting(monkeypatch)

    def refit(moments: HeldOut, name: str) -> tuple[Tensor, Refit]:
        return torch.zeros(moments.fit.cross.shape), Refit(name, 1.0, 1.0, 0.5)

    monkeypatch.setattr(HeldOut, "refit", refit)

    def reads(windows: int) -> Counter[str]:
        model = tiny_model(variant, torch.float32)
        plan = allocate(score(model, tiny_tokens(2)), Budget(neuron_ratio=0.3), round_to=8)
        found = Reads()
        with found:
            cut_and_repair_(model, plan, tiny_tokens(windows), batch_size=2)
        assert found.names.pop("aten.nonzero.default", 0) == 2 * 3 * -(-windows // 2), "of masks on the CPU alone"
        return found.names

    assert reads(4) == reads(12)


def test_moments_are_gathered_on_the_device() -> None:
    moments = HeldOut(weighted=True)
    for held in ([False, True], [False, False], [True, True]):
        values = [torch.empty(2, 5, size, device="meta") for size in (8, 6, 6)]
        moments.add(values[0], values[1], values[2], torch.tensor(held))
    for sums in (moments.fit, moments.held):
        assert all(total.is_meta and total.dtype == torch.float64 for total in vars(sums).values())


@pytest.mark.parametrize(
    ("free", "stays"), [(2 * 4 * 55 * (2 * 24 + 40), True), (2 * 4 * 55 * (2 * 24 + 40) - 1, False)]
)
def test_streams_stay_on_a_device_with_room(free: int, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.pruning.repair.free_bytes", lambda _: free)
    chain = verified_chain(tiny_model("llama", torch.float32))
    there = torch.empty(3, device="meta")
    keep = repair._keeper(chain, tiny_tokens(5, 11), 40)
    assert keep(torch.ones(3))().device.type == "cpu"
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda"))
    keep = repair._keeper(chain, tiny_tokens(5, 11), 40)
    if stays:
        assert keep(there)() is there
    else:
        with pytest.raises(NotImplementedError, match="meta"):
            keep(there)  # which is copied to the host
